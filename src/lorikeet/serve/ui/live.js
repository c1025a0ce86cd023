// The open microphone: streams to /v1/realtime, plays what comes back, and shows what happens meanwhile.
// A finished turn is handed to the page's chat through a hidden text field, so that the chat is the one record.
(() => {
  "use strict";
  const here = document.currentScript.src;
  const RATE = 24000;
  const STAGES = ["endpoint", "transcript", "search", "first_token", "first_clause", "first_audio"];
  let live = null;

  const find = (id) => document.getElementById(id);
  const chosen = (id) => document.querySelector(`#${id} label.selected input`)?.value;
  const write = (id, text) => { const part = find(id); if (part) part.textContent = text; };

  function show(state, words) {
    const panel = find("live");
    if (!panel) return;
    panel.dataset.state = state;
    write("live-state", words || { off: "", connecting: "Connecting …", listening: "Listening", hearing: "Listening …",
      thinking: "Thinking …", speaking: "Speaking" }[state]);
    const button = find("open-mic");
    button.setAttribute("aria-pressed", String(live !== null));
    button.querySelector("span").textContent = live ? "Stop talking" : "Talk";
  }

  function showWaterfall(waterfall) {
    const longest = Math.max(1, ...STAGES.map((stage) => waterfall[stage + "_ms"] || 0));
    const rows = STAGES.filter((stage) => stage + "_ms" in waterfall).map((stage) => {
      const row = document.createElement("div");
      const bar = document.createElement("i");
      const ms = waterfall[stage + "_ms"];
      bar.style.width = `${Math.max(1, (100 * ms) / longest)}%`;
      row.append(Object.assign(document.createElement("span"), { textContent: stage.replace("_", " ") }), bar,
        Object.assign(document.createElement("b"), { textContent: `${Math.round(ms)} ms` }));
      return row;
    });
    find("live-waterfall").replaceChildren(...rows);
  }

  // What is played, and how much of it was.
  class Speaker {
    constructor(context) { this.context = context; this.reset(); }
    reset() { this.nodes = new Set(); this.next = 0; this.item = null; this.sent = 0; }
    play(item, encoded) {
      if (item !== this.item) { this.item = item; this.sent = 0; }
      const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
      const samples = Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
      const buffer = this.context.createBuffer(1, samples.length, RATE);
      buffer.copyToChannel(samples, 0);
      const node = this.context.createBufferSource();
      node.buffer = buffer;
      node.connect(this.context.destination);
      this.next = Math.max(this.next, this.context.currentTime + 0.03);
      node.start(this.next);
      this.next += buffer.duration;
      this.sent += buffer.duration;
      this.nodes.add(node);
      node.onended = () => { this.nodes.delete(node); if (!this.nodes.size && live) live.quiet(); };
    }
    get busy() { return this.nodes.size > 0; }
    stop() {
      const left = Math.max(0, this.next - this.context.currentTime);
      const heard = { item: this.item, ms: Math.max(0, Math.floor(1000 * (this.sent - left))) };
      for (const node of this.nodes) { node.onended = null; node.stop(); }
      this.reset();
      return heard;
    }
  }

  class Conversation {
    constructor() { this.asked = new Map(); this.turn = {}; this.answers = new Map(); }

    async start() {
      show("connecting");
      this.stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
      this.context = new AudioContext();
      await this.context.audioWorklet.addModule(new URL("live_worklet.js", here));
      this.speaker = new Speaker(this.context);
      const address = new URL("../v1/realtime", here);
      address.protocol = address.protocol.replace("http", "ws");
      this.socket = new WebSocket(address);
      this.socket.onmessage = (message) => this.take(JSON.parse(message.data));
      this.socket.onclose = () => { if (live === this) this.stop(this.problem || "The connection ended."); };
      this.node = new AudioWorkletNode(this.context, "microphone", { numberOfOutputs: 0 });
      this.node.port.onmessage = (piece) => this.send({ type: "input_audio_buffer.append", audio: encode(piece.data) });
    }

    send(event) { if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event)); }

    stop(problem = "") {
      this.hush(problem);
      this.socket?.close();
    }

    // Stop, but take what was heard of the answer under way into the chat first.
    end() {
      const heard = this.speaker?.stop();
      this.hush();
      if (!this.active) { this.socket?.close(); return; }
      if (heard.item === this.item) this.truncate(heard);
      else this.send({ type: "response.cancel" });
      setTimeout(() => this.socket.close(), 2000);
    }

    hush(problem = "") {
      live = null;
      for (const track of this.stream?.getTracks() || []) track.stop();
      this.speaker?.stop();
      if (this.context && this.context.state !== "closed") this.context.close();
      show("off", problem);
      write("live-heard", "");
      write("live-said", "");
    }

    quiet() { if (find("live").dataset.state === "speaking" && !this.active) show("listening"); }

    // Called for each server event; unknown ones pass. Of one that was ended, only the last answer's end is of interest.
    take(event) {
      if (live !== this && event.type !== "response.done") return;
      const handlers = {
        "session.created": () => this.greet(),
        "session.updated": () => this.listen(),
        "input_audio_buffer.speech_started": () => this.hear(),
        "input_audio_buffer.speech_stopped": () => show("thinking"),
        "input_audio_buffer.cleared": () => show("listening"),
        "conversation.item.input_audio_transcription.completed": () => this.note(event),
        "conversation.item.deleted": () => this.asked.delete(event.item_id),
        "response.created": () => { this.active = event.response.id; this.said = ""; write("live-said", ""); },
        "response.output_item.added": () => { this.item = event.item.id; },
        "response.output_audio_transcript.delta": () => this.say(event.delta),
        "response.output_text.delta": () => this.say(event.delta),
        "response.output_audio.delta": () => { show("speaking"); this.speaker.play(event.item_id, event.delta); },
        "response.done": () => this.finish(event.response),
        "lorikeet.turn": () => showWaterfall(event.waterfall),
        "lorikeet.search": () => this.search(event),
        "error": () => this.fail(event.error),
      };
      if (handlers[event.type]) handlers[event.type]();
    }

    // Set what the visitor chose, from the next answer on.
    configure() {
      const lorikeet = { search: chosen("search") ?? "off", events: true };
      this.send({ type: "session.update", session: { type: "realtime", model: chosen("model") ?? "default", lorikeet } });
    }

    greet() {
      this.configure();
      for (const [role, text] of before()) {
        const type = role === "user" ? "input_text" : "output_text";
        this.send({ type: "conversation.item.create", item: { type: "message", role, content: [{ type, text }] } });
      }
    }

    listen() {
      if (this.source) return;
      this.source = this.context.createMediaStreamSource(this.stream);
      this.source.connect(this.node);
      show("listening");
    }

    hear() {
      show("hearing");
      if (!this.speaker.busy) return;
      this.truncate(this.speaker.stop());
      find("live").dataset.interrupted = String(Number(find("live").dataset.interrupted || 0) + 1);
    }

    truncate(heard) {
      this.send({ type: "conversation.item.truncate", item_id: heard.item, content_index: 0, audio_end_ms: heard.ms });
    }

    // What is forgotten must not be kept because it was broken off.
    forget() {
      if (this.active) this.send({ type: "conversation.item.delete", item_id: this.item });
      this.stop();
    }

    note(event) { this.asked.set(event.item_id, event.transcript); write("live-heard", event.transcript); }

    say(text) { this.said = (this.said || "") + text; write("live-said", this.said); }

    search(event) {
      if (event.status === "searching") { this.turn.search = { reason: event.reason }; show("thinking", "Searching the web …"); }
      if (event.status === "found" && this.turn.search) this.turn.search.sources = event.sources;
      if (event.status === "failed" && this.turn.search) this.turn.search.failed = event.message;
    }

    finish(response) {
      this.active = null;
      if (live === this && !this.speaker.busy && response.status !== "cancelled") show("listening");
      const problem = response.status === "failed" ? response.status_details.error.message : "";
      // A turn that is taken back has no question any more by the time that its events are through.
      setTimeout(() => {
        const asked = [...this.asked.values()].join(" ");
        const said = response.output[0]?.content[0]?.transcript || response.output[0]?.content[0]?.text || "";
        if (asked) hand({ asked, said, problem, id: response.id, cut: response.status === "cancelled", search: this.turn.search || null });
        this.asked.clear();
        this.turn = {};
        if (live !== this) this.socket.close();
      }, 50);
    }

    fail(error) {
      if (["item_not_found", "response_cancel_not_active"].includes(error.code)) return;
      this.problem = error.message;
      show(find("live").dataset.state, error.message);
    }
  }

  // The chat as it is, for the assistant to know what was said before: without searches, sources, and what got no answer.
  function before() {
    const turns = [...document.querySelectorAll("#chat .message-content")]
      .filter((part) => !part.closest(".thought-group") && !part.querySelector(".cited"))
      .map((part) => [part.closest("[data-testid]").dataset.testid === "user" ? "user" : "assistant", part.innerText.trim()])
      .filter(([, text]) => text);
    return turns.filter(([role], place) => role === "assistant" || turns[place + 1]?.[0] === "assistant").slice(-20);
  }

  function hand(turn) {
    const field = document.querySelector("#live-turn textarea, #live-turn input");
    field.value = JSON.stringify({ ...turn, at: Date.now() });
    field.dispatchEvent(new Event("input", { bubbles: true }));
    // Gradio takes the field's value over in its next update.
    setTimeout(() => document.querySelector("button#live-keep, #live-keep button").click(), 60);
  }

  function encode(buffer) {
    let letters = "";
    for (const byte of new Uint8Array(buffer)) letters += String.fromCharCode(byte);
    return btoa(letters);
  }

  document.addEventListener("click", async (event) => {
    if (!event.target.closest("#open-mic")) {
      if (live && event.target.closest("#forget")) live.forget();
      if (live && event.target.closest("#fresh")) live.stop();
      return;
    }
    if (live) { live.end(); return; }
    live = new Conversation();
    const mine = live;
    try {
      await mine.start();
    } catch (error) {
      const why = error.name === "NotAllowedError" ? "The browser did not allow the microphone."
        : navigator.mediaDevices ? "No microphone could be opened." : "The microphone needs https, or this machine's own address.";
      mine.stop(why);
    }
  });

  document.addEventListener("change", (event) => {
    // Gradio marks the choice a moment later.
    if (event.target.closest("#search, #model")) setTimeout(() => live?.configure(), 60);
  });
})();
