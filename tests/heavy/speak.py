"""Speaks a text into a WAV file with eSpeak NG: FOLDER of the package espeakng_loader, VOICE, TEXT, TARGET."""

from __future__ import annotations

import ctypes
import sys
import wave
from pathlib import Path

RETRIEVAL = 1  # the callback gets the samples
CHARACTERS, UTF8 = 1, 1


def main(folder: str, voice: str, text: str, target: str) -> None:
    library = ctypes.CDLL(str(Path(folder) / "libespeak-ng.so"))
    rate = library.espeak_Initialize(RETRIEVAL, 0, str(folder).encode(), 0)
    assert rate > 0, "eSpeak NG cannot begin"
    samples = bytearray()

    def take(pointer: ctypes.c_void_p, count: int, _: ctypes.c_void_p) -> int:
        if pointer:
            samples.extend(ctypes.string_at(pointer, count * 2))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(take)
    library.espeak_SetSynthCallback(callback)
    assert library.espeak_SetVoiceByName(voice.encode()) == 0, f"there is no voice {voice}"
    library.espeak_SetParameter(1, 140, 0)  # words a minute
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, CHARACTERS, 0, UTF8, None, None)
    library.espeak_Synchronize()
    with wave.open(target, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(bytes(samples))


if __name__ == "__main__":
    main(*sys.argv[1:])
