"""espeak-ng through ctypes: text to phonemes, text to samples.

The library keeps its state in globals and its audio depends on all that was said before, so
callers that need the same bytes again start it in a fresh process.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_PHONEMES_IPA = 2
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER

_SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@cache
def variants() -> frozenset[str]:
    """Returns the names of the voice variants that the data folder holds."""
    return frozenset(
        path.name for path in Path(espeakng_loader.get_data_path(), "voices/!v").iterdir()
    )


def is_loaded() -> bool:
    """Tells whether this process has used espeak-ng."""
    return _started.cache_info().currsize > 0


@cache
def _started() -> tuple[ctypes.CDLL, int]:
    """The library and its sample rate; once, as a second start leaves it dangling pointers."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
        ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [
        ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    data = str(Path(espeakng_loader.get_data_path()).parent).encode()
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _INITIALIZE_DONT_EXIT)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng did not start with the data in {data.decode()}")
    return library, rate


class Espeak:
    """One language's synthesiser; at most one in a process at a time.

    Attributes:
        sample_rate: Of the samples that `say` returns, Hz.
    """

    def __init__(self, voice: str, variant: str | None = None) -> None:
        """Loads the library and choose a voice.

        Args:
            voice: espeak-ng's name of a language, such as "nl" or "pt-br".
            variant: Name of a voice variant, such as "f2"; None for the language's own voice.

        Raises:
            ValueError: espeak-ng has no such voice or variant.
        """
        # An unknown variant is not an error to espeak-ng: it would speak with the plain voice.
        if variant is not None and variant not in variants():
            raise ValueError(
                f"espeak-ng has no voice variant {variant!r}; "
                f"it has {', '.join(sorted(variants()))}"
            )
        self._library, self.sample_rate = _started()
        name = voice if variant is None else f"{voice}+{variant}"
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}")
        self._pieces: list[bytes] = []
        self._callback = _SynthCallback(self._receive)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def say(
        self, text: str, *, rate: int, pitch: int, pitch_range: int, seed: int
    ) -> NDArray[np.int16]:
        """Returns the samples of a sentence.

        Args:
            text: What to say.
            rate: Words per minute, 80 to 450.
            pitch: 0 to 99, the voice's own at 50.
            pitch_range: 0 (monotone) to 99, the voice's own at 50.
            seed: Of the noise that the synthesiser itself uses.
        """
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        # The full volume of 100 clips in some variants.
        for parameter, value in (
            (_RATE, rate),
            (_PITCH, pitch),
            (_RANGE, pitch_range),
            (_VOLUME, 60),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        data = text.encode() + b"\0"
        if self._library.espeak_Synth(data, len(data), 0, 1, 0, _CHARS_UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng failed on {text!r}")
        return np.frombuffer(b"".join(self._pieces), np.int16)

    def phonemes(self, text: str) -> str:
        """Returns the text as espeak-ng would say it, in IPA; "(en)" marks a change of language."""
        rest = ctypes.c_char_p(text.encode())
        clauses = []
        while rest.value:
            clause = self._library.espeak_TextToPhonemes(
                ctypes.byref(rest), _CHARS_UTF8, _PHONEMES_IPA
            )
            clauses.append(clause.decode())
        return " ".join(clauses)

    def reads_as_foreign(self, text: str) -> bool:
        """Tells whether espeak-ng would switch to another language within the text."""
        return re.search(r"\([a-z-]+\)", self.phonemes(text)) is not None

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _: object) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0
