"""Every served method, and every family of the kit, is tested by the laws of `method_contract`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from adapters_store.methods import METHODS
from tests.adapters_store.methods.method_contract import MethodContract
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED

PACKAGE = __name__.rpartition(".")[0]


def contracts(kind: type[MethodContract] = MethodContract) -> Iterator[type[MethodContract]]:
    """Yield every test class of this folder that inherits the laws."""
    for derived in kind.__subclasses__():
        if derived.__name__.startswith("Test"):
            yield derived
        yield from contracts(derived)


def test_every_served_method_keeps_the_contract() -> None:
    """A method in `METHODS` has a class of tests, and so has whatever the kit makes of it."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(f"{PACKAGE}.{path.stem}")
    assert {contract.PEFT_TYPE for contract in contracts()} == METHODS.keys()
    families = {family for contract in contracts() for family in contract.FAMILIES}
    assert families == {*FAMILIES, *FAMILIES_OF_BIASED}
