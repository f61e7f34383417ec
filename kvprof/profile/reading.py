"""What calibration text a measurement is asked for, and that text as its model reads it.

Reads a config, a tokenizer and text; loads no weight. Does not know what is measured on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from kvprof.calibration.mixture import MixedText, TextRequest, mix_texts
from kvprof.calibration.self_generated import streamable
from kvprof.calibration.sequences import CALIBRATION_LENGTH, choose_length
from kvprof.calibration.spec import USUAL_DATA
from kvprof.models.decoder import text_config
from kvprof.models.inventory import position_limit
from kvprof.models.load import ModelSource, load_tokenizer, weight_bytes

USUAL_SEQUENCES = 8


@dataclass(frozen=True)
class TextSettings:
    """What text to measure on, and how the model is loaded.

    data, split, column, config: as `calibration.mixture.TextRequest` has them. sequence_length: None is
    CALIBRATION_LENGTH, or what the model was made for where that is less. dtype, device, stream: as
    `models.load.load_model` takes them.
    """

    data: Sequence[str] = USUAL_DATA
    split: str | None = None
    sequences: int = USUAL_SEQUENCES
    sequence_length: int | None = None
    seed: int = 0
    pack: bool = False
    dtype: str = "auto"
    device: str = "auto"
    stream: bool = False
    column: str | None = None
    config: str | None = None


def read_text(source: ModelSource, config: PretrainedConfig, settings: TextSettings) -> tuple[MixedText, Any]:
    """Return the text, what the model is to write itself still open, and the tokenizer. config: the whole model's.

    Raises CalibrationError or UsageError for text that cannot be measured on.
    """
    decoder_config = text_config(config)
    length = choose_length(settings.sequence_length, position_limit(decoder_config), CALIBRATION_LENGTH)
    tokenizer = load_tokenizer(source)
    data = tuple(settings.data)
    if settings.stream:
        data = streamable(data, settings.sequences, length, weight_bytes(config, settings.dtype))
    mix = mix_texts(
        TextRequest(
            data,
            settings.sequences,
            length,
            split=settings.split,
            seed=settings.seed,
            pack=settings.pack,
            column=settings.column,
            config=settings.config,
        ),
        tokenizer,
    )
    mix.check_vocabulary(decoder_config.vocab_size)
    return mix, tokenizer
