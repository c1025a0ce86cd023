"""The folder of spoken answers."""

from __future__ import annotations

import gc

import numpy as np

from lorikeet.serve.ui.clips import KEPT, Clips


def test_the_folder_goes_with_its_page_and_nobody_is_warned() -> None:
    clips = Clips()
    path = clips.path(clips.keep(np.zeros(240, np.float32), 24_000))
    assert path is not None and path.is_file()
    del clips
    gc.collect()
    assert not path.parent.exists()


def test_only_the_newest_are_kept_and_only_their_names_are_known() -> None:
    clips = Clips()
    names = [clips.keep(np.zeros(24, np.float32), 24_000) for _ in range(KEPT + 1)]
    newest = clips.path(names[-1])
    assert newest is not None and newest.is_file() and len(list(newest.parent.iterdir())) == KEPT
    assert clips.path(names[0]) is None and clips.path("../" + names[1]) is None
