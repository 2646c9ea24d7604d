"""The predicted rise of the refusal loss against the product written out in full."""

import pytest
import torch

from repair.context import RepairContext
from repair.first_order import adapter_damage
from repair.lora import LoraAdapter
from tests import tiny
from tests.repair import dense
from tests.repair.calibrated import UP, context_in, whole_gradient


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RepairContext:
    return context_in(tmp_path_factory.mktemp("model"))


def test_it_is_the_sum_of_the_inner_products_of_whole_matrices(context: RepairContext) -> None:
    """And it is linear in the update: half the adapter is predicted to do half the damage."""
    adapter = tiny.adapter()
    wanted = sum(float((whole_gradient(context, layer) * dense.delta(layer)).sum()) for layer in adapter.layers)
    found = adapter_damage(adapter, context.calibration)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert adapter_damage(adapter.scaled(0.5), context.calibration) == pytest.approx(wanted / 2, rel=1e-4)


def test_what_is_not_known_is_not_guessed(context: RepairContext) -> None:
    """No calibration, no module that it looked at, no plain update: no number, rather than a nought."""
    adapter = tiny.adapter()
    assert adapter_damage(adapter, None) is None
    dora = tiny.layer(UP, magnitude=torch.ones(97))
    assert adapter_damage(LoraAdapter(layers=(dora,)), context.calibration) is None
