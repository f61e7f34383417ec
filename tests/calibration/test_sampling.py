"""Do the tokens follow the model's own distribution, and nothing but it and the draws?"""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprof.calibration.sampling import sample_documents
from kvprof.errors import CalibrationError


def uniform(rows: int, steps: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample_tokens(model: object, first: list[int], draws: Tensor) -> Tensor:
    """Continue each first token by one token for each of its draws."""
    rows, steps = draws.shape
    numbers = [iter(row.tolist()).__next__ for row in draws]
    written = sample_documents(model, [[token] for token in first], [1 + steps] * rows, numbers)  # type: ignore[arg-type]
    return torch.tensor(written)


class Fixed(nn.Module):
    """A model that says the same of every token: (V,) logits."""

    def __init__(self, logits: list[float], keeps_a_cache: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(logits), 1)
        self.logits = torch.tensor(logits)
        self.cache = object() if keeps_a_cache else None
        self.dtype = torch.float16
        text = SimpleNamespace(vocab_size=len(logits))
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        logits = self.logits.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits, past_key_values=self.cache)


def test_every_architecture_writes_what_its_whole_forward_says(any_tiny: tuple[str, PreTrainedModel]) -> None:
    _, model = any_tiny
    draws = uniform(2, 23)
    written = sample_tokens(model, [5, 60], draws)
    assert written.shape == (2, 24)
    assert written[:, 0].tolist() == [5, 60]
    with torch.no_grad():
        logits = model(input_ids=written, use_cache=False).logits[:, :-1].double()  # (2, 23, V)
    sums = logits.softmax(-1).cumsum(-1)
    chosen = written[:, 1:, None]
    above = sums.gather(-1, chosen)[..., 0]
    below = above - logits.softmax(-1).gather(-1, chosen)[..., 0]
    assert (draws >= below - 1e-4).all()
    assert (draws <= above + 1e-4).all()


def test_the_frequency_of_each_token_is_its_probability() -> None:
    model = tiny_model("llama")
    rows = 20_000
    written = sample_tokens(model, [7] * rows, uniform(rows, 1))[:, 1]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[7]])).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount(written.numpy(), minlength=len(expected))
    assert expected.min() * rows > 5  # where the test is valid
    assert chisquare(counts, expected / expected.sum() * rows).pvalue > 0.01


def test_rare_tokens_of_a_large_vocabulary_come_as_often_as_they_should() -> None:
    logits = [10.0] + [0.0] * 60_000  # one token has a fourth, each other one part in 82,000
    written = sample_tokens(Fixed(logits), [0] * 200, uniform(200, 20))[:, 1:].double().flatten()
    share = 60_000 / (60_000 + float(np.exp(10)))
    rare = written[written > 0]
    assert abs(len(rare) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert chisquare(np.histogram(rare.numpy(), bins=10, range=(1, 60_001))[0]).pvalue > 0.01


def test_a_token_that_cannot_be_is_never_chosen() -> None:
    nothing = float("-inf")
    model = Fixed([nothing, 0.0, nothing, 0.0, nothing])
    draws = torch.tensor([[0.0, 0.49999, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert sample_tokens(model, [1], draws).tolist() == [[1, 1, 1, 3, 3]]


def test_a_row_is_the_same_in_every_batch() -> None:
    model = tiny_model("qwen3")
    draws = uniform(6, 40)
    together = sample_tokens(model, [1, 2, 3, 4, 5, 6], draws)
    for rows in ([0], [3, 1], [5, 4, 2, 0]):
        apart = sample_tokens(model, [row + 1 for row in rows], draws[rows])
        assert apart.tolist() == together[rows].tolist()


def test_the_generation_config_is_not_asked() -> None:
    model = tiny_model("llama")
    plain = sample_tokens(model, [1, 2], uniform(2, 30))
    model.generation_config.update(
        do_sample=False,
        temperature=0.01,
        top_k=1,
        repetition_penalty=9.0,
        suppress_tokens=list(range(90)),
        max_length=3,
        eos_token_id=int(plain[0, 5]),
    )
    assert sample_tokens(model, [1, 2], uniform(2, 30)).tolist() == plain.tolist()


def test_no_global_random_state_is_read_or_moved() -> None:
    model = tiny_model("llama")
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = sample_tokens(model, [1], uniform(1, 20))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(2)
    assert sample_tokens(model, [1], uniform(1, 20)).tolist() == first.tolist()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sample_tokens(model, [1], uniform(1, 5))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))  # no inference tensor is left inside


def test_a_document_ends_with_the_token_that_ends_a_text_and_is_no_longer_than_its_limit() -> None:
    model = Fixed([0.0, 9.0, 0.0])  # says 1, nearly always
    draws = uniform(3, 60).tolist()
    numbers = [iter(row).__next__ for row in draws]
    found = sample_documents(model, [[2]] * 3, [60, 60, 5], numbers, ends={0})
    for row, document in enumerate(found):
        assert 0 not in document[1:-1]
        assert document[-1] == 0 or len(document) == (5 if row == 2 else 60)
    assert sample_documents(model, [[2]] * 2, [60, 60], [lambda: 0.0, lambda: 0.5], ends=[0]) == [
        [2, 0],
        [2] + [1] * 59,
    ]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "falcon-h1"])
def test_rows_that_have_ended_change_nothing_in_the_others(name: str) -> None:
    model = tiny_model(name)
    draws = uniform(5, 50, seed=3)
    whole = sample_tokens(model, [5] * 5, draws).tolist()
    ends = {whole[0][4], whole[2][20]}
    found = sample_documents(model, [[5]] * 5, [51] * 5, [iter(row.tolist()).__next__ for row in draws], ends)
    for row, document in zip(whole, found, strict=True):
        stop = next((place for place, token in enumerate(row) if place and token in ends), 50)
        assert document == row[: stop + 1]


def test_an_opening_of_several_tokens_is_read_whole() -> None:
    model = tiny_model("llama")
    draws = uniform(1, 20)[0].tolist()
    (found,) = sample_documents(model, [[5, 17, 60]], [13], [iter(draws).__next__])
    with torch.no_grad():
        sums = model(input_ids=torch.tensor([found]), use_cache=False).logits[0, 2:-1].double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(sums, torch.tensor(draws[:10], dtype=torch.float64)[:, None], right=True)[:, 0]
    assert found == [5, 17, 60, *expected.tolist()]


def test_a_head_wider_than_the_vocabulary_writes_only_what_can_be_read() -> None:
    model = Fixed([0.0, 0.0, 20.0])
    model.config.get_text_config(decoder=True).vocab_size = 2
    assert sample_tokens(model, [1], uniform(1, 50)).max() == 1


def test_every_token_is_counted() -> None:
    steps: list[int] = []
    sample_documents(Fixed([0.0, 0.0]), [[1], [1]], [8, 3], [lambda: 0.0] * 2, step=steps.append)
    assert steps == [2, 2, 1, 1, 1, 1, 1]
    assert sample_documents(Fixed([0.0, 0.0]), [[1], [0]], [1, 1], [lambda: 0.0] * 2) == [[1], [0]]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "falcon-h1"])
def test_documents_of_one_text_are_those_that_are_written_alone(name: str) -> None:
    """Each as long as those before it leave room for; the first alone where a recurrent state holds all rows."""
    model = tiny_model(name)
    draws = uniform(6, 200, seed=3).tolist()
    whole = sample_tokens(model, [5], uniform(6, 200, seed=3)[:1])[0].tolist()
    ends = {whole[9]}
    counted: list[int] = []
    numbers = [iter(row).__next__ for row in draws]
    texts = [0, 0, 0, 1, 1, 1]
    found = sample_documents(model, [[5]] * 6, [40] * 6, numbers, ends, counted.append, texts)
    standing = 0
    for text in (0, 1):
        room = 40
        for row in range(3 * text, 3 * text + 3):
            if name == "falcon-h1" and row % 3:
                assert found[row] == []
                continue
            (alone,) = sample_documents(model, [[5]], [200], [iter(draws[row]).__next__], ends)
            expected = alone[:room]
            assert found[row][: len(expected)] == expected
            standing += len(expected)
            room -= len(expected)
            if room <= 0:
                break
    assert sum(counted) == standing - 2  # the openings of the first two stand there already


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_one_message_with_advice(wrong: float) -> None:
    with pytest.raises(CalibrationError, match=r"float16 its predictions are not finite.*\n.*--dtype float32"):
        sample_tokens(Fixed([0.0, wrong, 1.0]), [1], uniform(1, 4))


def test_where_no_dtype_is_wider_damaged_weights_are_named() -> None:
    model = Fixed([0.0, float("nan"), 1.0])
    model.dtype = torch.float32
    with pytest.raises(CalibrationError, match=r"float32 its predictions are not finite.*\n.*weights are damaged"):
        sample_tokens(model, [1], uniform(1, 4))


def test_a_model_without_a_cache_says_so() -> None:
    with pytest.raises(CalibrationError, match=r"keeps no cache.*\n.*Leave `self` out"):
        sample_tokens(Fixed([0.0, 1.0], keeps_a_cache=False), [1], uniform(1, 4))
