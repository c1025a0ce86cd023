// The microphone, from whatever rate it has to 24 kHz, as 16-bit samples in pieces of 20 ms.
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.step = sampleRate / 24000;
    this.at = 0; // place of the next output sample, in input samples from the start of `held`
    this.held = new Float32Array(0);
    this.piece = new Int16Array(480);
    this.filled = 0;
  }

  process(inputs) {
    const heard = inputs[0][0];
    if (!heard) return true;
    const all = new Float32Array(this.held.length + heard.length);
    all.set(this.held);
    all.set(heard, this.held.length);
    // Each output sample is the mean of the input it stands for: a plain low-pass, enough for speech.
    while (this.at + this.step < all.length) {
      const first = Math.floor(this.at);
      const last = Math.max(first + 1, Math.floor(this.at + this.step));
      let sum = 0;
      for (let i = first; i < last; i++) sum += all[i];
      const value = Math.max(-1, Math.min(1, sum / (last - first)));
      this.piece[this.filled++] = Math.round(value * 32767);
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice().buffer);
        this.filled = 0;
      }
      this.at += this.step;
    }
    const used = Math.floor(this.at);
    this.held = all.slice(used);
    this.at -= used;
    return true;
  }
}
registerProcessor("microphone", Microphone);
