"""norms, gradients and spectra as functions.

Read a model, and text; return records. Write a file only where a folder is named.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.api.given import (
    LARGEST_SEED,
    Progress,
    borrowed,
    check_around,
    check_counts,
    check_flags,
    check_range,
    check_whole,
    check_window,
    check_words,
    joined,
    remark,
    results_in,
    several,
    silent,
    word,
)
from kvprof.errors import UsageError
from kvprof.records.scores import Scores
from kvprof.records.spectra import Spectra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvprof.allocate.target import Target
    from kvprof.profile.decoder import Decoder


def norms(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Measure how large W_k and W_v are, layer by layer, as `kvprof norms` does; never loads a model that is named.

    model: a hub id, a folder, a .gguf file, or `demo` (the default); or a loaded transformers model, whose weights are
    read where they are. tokenizer: not needed, and taken so that all functions can be called alike.
    trust_remote_code: let Python code run that comes with the model, where transformers has none for it. out: a folder
    for norms.json and, meanwhile, the journal that a stopped run goes on from; without it nothing is written. restart:
    begin anew there. progress: called with (bytes done, bytes in all).
    Returns Scores: of each layer's whole (out_features, in_features) projection `spectral_norm`, `frobenius_norm` and
    `stable_rank`, and of each KV head, in the weights' own units; of a bias or a norm after k_proj, its size too.
    Raises ModelError, UnknownLayout or NonFiniteWeight for a model that cannot be measured, UsageError for no model.
    """
    from kvprof.profile.norms import run_norms

    check_flags(trust_remote_code=trust_remote_code, restart=restart)
    check_around(out, progress)
    with borrowed(model, tokenizer, trust_remote_code) as source, results_in(out, source.id) as folder:
        run = run_norms(source, folder, restart, progress or silent)
    remark(run.remarks)
    return run.scores


def gradients(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    data: str | Path | Sequence[str | Path] | None = None,
    split: str | None = None,
    column: str | None = None,
    config: str | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    formats: str | Sequence[str] | None = None,
    target: str | None = None,
    layers: str | None = None,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
    suffix_fraction: float = 0.5,
    until_stable: bool = False,
    stable_at: str | float | Sequence[str | float] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    pack: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
    shard: str | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Measure how much the loss feels each layer's keys and values, as `kvprof gradients` does.

    model: as `norms` takes it; a loaded one is measured in the dtype and on the device that it has, and given back as
    it was. tokenizer: of a loaded model; or the name of whose to take, as --tokenizer does. data: `builtin`, `self`,
    files or hub datasets, as NAME or NAME:WEIGHT; builtin and self by default. sequences: 8 by default, 32 with
    until_stable. sequence_length: tokens; 1024 by default, or the model's own limit. formats: whose loss to predict,
    such as "int3g64,value:rot2"; "none" for gradient norms alone. target: score another runtime's formats instead.
    layers: whether those of a sliding window are scored too, `all` (the default), or left alone, `full`. sink_tokens,
    recent_tokens: kept in full precision. The rest is named as the command's options are. out: a folder for
    gradients.json and its journal; without it, no file is written but what the model writes for `self`, in the user's
    cache folder. progress: called with (sequences done, in all).
    Returns Scores: of each layer's K and V `gradient_norm`, the mean over sequences of the L2 norm of dLoss/dW (nats a
    token, by the weights' units), and `loss_increase`, by format, in nats a token; with standard errors.
    Raises UsageError for options that do not go together or a loaded model without a tokenizer, CalibrationError for
    text that cannot be read, ModelError for a model that cannot be measured, NonFiniteGradient where numbers overflow.
    """
    from kvprof.analysis.stability import StableAt
    from kvprof.calibration.spec import USUAL_DATA
    from kvprof.profile.reading import USUAL_SEQUENCES
    from kvprof.profile.request import SEQUENCES_UNTIL_STABLE, SensitivitySettings
    from kvprof.profile.sensitivity import run_sensitivity
    from kvprof.profile.shards import read_share
    from kvprof.targets.registry import target_named

    if stable_at is not None and not until_stable:
        raise UsageError("stable_at says what until_stable looks at, which is not asked for.\n  Add until_stable=True.")
    check_words(split=split, column=column, config=config, target=target, shard=shard)
    check_flags(until_stable=until_stable, pack=pack, stream=stream, trust_remote_code=trust_remote_code)
    check_flags(restart=restart)
    check_around(out, progress)
    check_window(sink_tokens, recent_tokens)
    check_whole(sequences=sequences, sequence_length=sequence_length)
    check_counts(batch_size=batch_size, seed=seed)
    check_range("suffix_fraction", suffix_fraction, 0.01, 1)
    check_range("seed", seed, 0, LARGEST_SEED)
    runtime = None if target is None else target_named(target)
    decoder = decoder_asked(joined(formats), runtime, sink_tokens, recent_tokens, suffix_fraction, layers)
    if sequences is None:
        sequences = SEQUENCES_UNTIL_STABLE if until_stable else USUAL_SEQUENCES
    settings = SensitivitySettings(
        data=USUAL_DATA if data is None else several(data),
        split=split,
        column=column,
        config=config,
        sequences=sequences,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        pack=pack,
        dtype=word(dtype),
        device=word(device),
        stream=stream,
        share=read_share(shard) if shard is not None else None,
        decoder=decoder,
    )
    budgets = () if stable_at is None else [stable_at] if isinstance(stable_at, str | float | int) else stable_at
    question = StableAt(budgets) if until_stable else None
    with borrowed(model, tokenizer, trust_remote_code) as source, results_in(out, source.id) as folder:
        run = run_sensitivity(
            source,
            settings,
            folder,
            restart,
            progress or silent,
            is_enough=question,
            check=question.check if question else None,
        )
    remark(run.remarks)
    return run.scores


def decoder_asked(
    formats: str | None,
    runtime: Target | None,
    sink_tokens: int | None,
    recent_tokens: int | None,
    suffix_fraction: float,
    layers: str | None = None,
) -> Decoder:
    """Return whose losses are predicted: of the formats that are named, else those of a runtime, else kvprof's own.

    sink_tokens, recent_tokens: instead of the runtime's window, or of the usual one. layers: `all` or `full`, by
    default as the runtime does. Raises UsageError for another word.
    """
    from kvprof.allocate.target import check_latents, layer_choice
    from kvprof.profile.decoder import Decoder, read_formats
    from kvprof.records.plan import USUAL_WINDOW

    if runtime is None:
        window, usual, check = USUAL_WINDOW, None, Decoder.check
    else:
        window, usual, check = runtime.window, runtime.to_score, functools.partial(check_latents, runtime)
    return Decoder(
        usual if formats is None else read_formats(formats),
        window.with_tokens(sink_tokens, recent_tokens),
        suffix_fraction,
        passes_over=formats is None,
        layers=layer_choice(layers, runtime),
        check=check,
    )


def spectra(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    data: str | Path | Sequence[str | Path] | None = None,
    split: str | None = None,
    column: str | None = None,
    config: str | None = None,
    sequences: int = 8,
    sequence_length: int | None = None,
    seed: int = 0,
    pack: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Spectra:
    """Measure the singular values of the cached keys and values on text, as `kvprof spectra` does.

    model, tokenizer, data, sequence_length, out, progress: as `gradients` takes them.
    Returns Spectra: of each layer's K and V the singular values of a head's (T, D) cache, descending, as a mean over
    sequences and heads with the least and the largest head's; in the units of keys and values.
    Raises what `gradients` does.
    """
    from kvprof.calibration.spec import USUAL_DATA
    from kvprof.profile.reading import TextSettings
    from kvprof.profile.spectra import run_spectra

    check_words(split=split, column=column, config=config)
    check_flags(pack=pack, stream=stream, trust_remote_code=trust_remote_code, restart=restart)
    check_around(out, progress)
    check_whole(sequence_length=sequence_length)
    check_counts(sequences=sequences, seed=seed)
    check_range("seed", seed, 0, LARGEST_SEED)
    settings = TextSettings(
        data=USUAL_DATA if data is None else several(data),
        split=split,
        column=column,
        config=config,
        sequences=sequences,
        sequence_length=sequence_length,
        seed=seed,
        pack=pack,
        dtype=word(dtype),
        device=word(device),
        stream=stream,
    )
    with borrowed(model, tokenizer, trust_remote_code) as source, results_in(out, source.id) as folder:
        run = run_spectra(source, settings, folder, restart, progress or silent)
    remark(run.remarks)
    return run.spectra
