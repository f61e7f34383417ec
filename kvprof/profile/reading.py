"""The calibration text that a measurement is asked for, as its model reads it.

Reads a config, a tokenizer and text; loads no weight. Does not know what is measured on it.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from kvprof.calibration.mixture import MixedText, TextRequest, mix_texts
from kvprof.calibration.self_generated import streamable
from kvprof.calibration.sequences import CALIBRATION_LENGTH, choose_length
from kvprof.calibration.spec import USUAL_DATA
from kvprof.models.config import weight_bytes
from kvprof.models.decoder import text_config
from kvprof.models.inventory import position_limit
from kvprof.models.load import load_tokenizer
from kvprof.models.source import ModelSource
from kvprof.records.requests.measure import Measuring


def read_text(source: ModelSource, config: PretrainedConfig, request: Measuring) -> tuple[MixedText, Any]:
    """Return the text, what the model is to write itself still open, and the tokenizer. config: the whole model's.

    Raises CalibrationError or UsageError for text that cannot be measured on.
    """
    decoder_config = text_config(config)
    length = choose_length(request.sequence_length, position_limit(decoder_config), CALIBRATION_LENGTH)
    tokenizer = load_tokenizer(source)
    data = request.data or USUAL_DATA
    if request.stream:
        data = streamable(data, request.most_sequences, length, weight_bytes(config, request.dtype))
    mix = mix_texts(TextRequest.of(request, data, length), tokenizer)
    mix.check_vocabulary(decoder_config.vocab_size)
    return mix, tokenizer
