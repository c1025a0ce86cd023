"""Coqui TTS: the real library with a small model of the seed voice's kind, made and saved on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorikeet.errors import InputError, MachineError
from lorikeet.speech.speak import load_voice

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.fixture(scope="module")
def tacotron() -> tuple[Any, Any]:
    """Coqui's Tacotron 2 and its settings; the tests are skipped where the library cannot be used."""
    try:
        from TTS.tts.configs.tacotron2_config import Tacotron2Config
        from TTS.tts.models.tacotron2 import Tacotron2
    except (ImportError, OSError) as error:
        pytest.skip(f"coqui-tts is not installed, or cannot be loaded here: {str(error).splitlines()[0]}")
    return Tacotron2, Tacotron2Config


@pytest.fixture(scope="module")
def model_folder(tacotron: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("coqui")
    torch.manual_seed(0)
    kind, settings = tacotron
    config = settings(r=2, max_decoder_steps=30, use_phonemes=False, text_cleaner="english_cleaners")
    model = kind.init_from_config(config)
    torch.save({"model": model.state_dict(), "config": config.to_dict()}, folder / "best_model.pth")
    config.save_json(folder / "config.json")
    return folder


def test_a_saved_model_speaks_sentence_by_sentence(model_folder: Path) -> None:
    voice = load_voice(f"coqui:{model_folder}")
    assert voice.sample_rate_hz == 22_050
    parts = list(voice.speak("Hello there. How are you?"))
    assert len(parts) == 2
    for samples in parts:
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert samples.size > 2000
        assert np.isfinite(samples).all()


def test_a_folder_without_its_settings_or_with_a_broken_model_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_voice(f"coqui:{tmp_path}")
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    with pytest.raises(MachineError, match="cannot load the voice coqui:"):
        load_voice(f"coqui:{tmp_path}")


def test_a_model_that_cannot_be_fetched_is_one_line(tacotron: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def refuse(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(MachineError, match=r"cannot load the voice coqui: no network.*hibari"):
        load_voice("coqui")
