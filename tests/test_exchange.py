"""What micro-batches and ranks put together."""

import pytest
import torch
from accelerate import Accelerator

from kartina.training.exchange import Line, advance


def test_scalars_are_averaged_by_samples_and_codes_are_added_up():
    """Two micro-batches of 1 and 3 samples, of which each meets other codes: together they meet all four, evenly."""
    parts = [
        (
            "tokenizer",
            (torch.tensor(2.0), torch.tensor(1.0)),
            {"error": torch.tensor(1.0), "codes": codes([4, 4, 0, 0])},
        ),
        (
            "tokenizer",
            (torch.tensor(3.0), torch.tensor(3.0)),
            {"error": torch.tensor(5.0), "codes": codes([0, 0, 4, 4])},
        ),
    ]
    line = Line(Accelerator(cpu=True))
    line.count(parts)
    found = line.of(parts)
    expected = {"total": 5 / 4, "error": (1 + 3 * 5) / 4, "usage": 1.0, "perplexity": 4.0, "counts_per_code": 4.0}
    assert found == pytest.approx({f"tokenizer/{name}": value for name, value in expected.items()})


def test_codes_are_of_all_steps_since_the_line_before():
    """Three steps that meet one other code each, and a line after the second; an average would say that one is met."""
    line = Line(Accelerator(cpu=True))
    found = []
    for met in ([8, 0, 0, 0], [0, 8, 0, 0], [0, 0, 8, 0]):
        step = [("tokenizer", (torch.tensor(1.0), torch.tensor(1.0)), {"codes": codes(met)})]
        line.count(step)
        if met[0] == 0:
            found.append(line.of(step))
    assert [one["tokenizer/usage"] for one in found] == [0.5, 0.25]
    assert [one["tokenizer/perplexity"] for one in found] == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("due", [True, False])
def test_a_scalar_that_is_a_function_is_called_before_the_backward_pass_where_a_line_is_due_and_codes_always(due):
    weight = torch.ones((), requires_grad=True)
    seen = []

    def late():
        seen.append(weight.grad)
        return torch.tensor(7.0)

    def updates():
        yield (
            "tokenizer",
            (3 * weight, torch.tensor(1.0)),
            {"error": torch.tensor(5.0), "late": late, "codes": lambda: codes([1])},
        )

    (update,) = advance([updates()], [], Accelerator(cpu=True), due)
    assert weight.grad == 3 and seen == ([None] if due else [])
    assert update[2] == {"codes": 1.0} | ({"error": 5.0, "late": 7.0} if due else {})


def codes(counts):
    return torch.tensor(counts, dtype=torch.float32)
