"""An artifact's method and base are checked before anything else of it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adapters_store import methods
from adapters_store.base.spec import BaseSpec, ItemBytes
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.format.manifest import BaseRef
from adapters_store.methods import METHODS, Method, method_of
from adapters_store.methods.compile import Room, compile_patch
from adapters_store.methods.shared.unsupported import CONVERTIBLE, INCONVERTIBLE
from adapters_store.primitives import Primitive
from tests.kit.forge import OTHER_IDENTITY, WEIGHTS_DIGEST, toy_artifact, toy_config, toy_manifest, toy_spec


def test_a_patch_carries_the_digest_and_the_method() -> None:
    """Identity is the artifact's digest; the parameters are those of its tensors."""
    artifact = toy_artifact(manifest=toy_manifest())
    patch = compile_patch(artifact, toy_spec())
    assert (patch.digest, patch.method) == (artifact.digest, "lora")
    assert patch.num_parameters == sum(tensor.numel() for tensor in artifact.tensors.values())


def test_another_base_is_refused_by_both_names() -> None:
    """An artifact whose manifest names another identity is refused, naming its base and this one."""
    manifest = toy_manifest(base=BaseRef("other", OTHER_IDENTITY, WEIGHTS_DIGEST))
    with pytest.raises(ArtifactError, match=r"trained on other \(bbbb.* base is toy \(aaaa") as caught:
        compile_patch(toy_artifact(manifest=manifest), toy_spec())
    assert caught.value.code == "wrong_base"


def test_other_weights_of_the_same_base_are_not_refused() -> None:
    """Copies and precisions differ in their weights' digest; parity decides then."""
    compile_patch(toy_artifact(manifest=toy_manifest(base=BaseRef("toy", "a" * 64, "e" * 64))), toy_spec())


@pytest.mark.parametrize("peft_type", ["lora", "BONE", "NOPE", "", "X" * 1000])
def test_a_method_that_is_not_known_is_refused_by_name(peft_type: str) -> None:
    """An unknown peft_type is refused, and what is served is listed."""
    with pytest.raises(ArtifactError, match=f"peft_type {peft_type[:40]} is not known; served are .*LORA") as caught:
        compile_patch(toy_artifact(toy_config(peft_type=peft_type)), toy_spec())
    assert (caught.value.code, caught.value.param) == ("method_unsupported", "peft_type")


@pytest.mark.parametrize("peft_type", [kind.value for kind in PeftType])
def test_every_method_of_peft_is_served_or_refused_with_what_to_do(peft_type: str) -> None:
    """Every method of the installed PEFT is served, or refused with what to do instead."""
    if peft_type in METHODS:
        assert METHODS[peft_type].name == peft_type.lower()
        assert peft_type not in CONVERTIBLE | INCONVERTIBLE
        return
    can = "but PEFT can convert it to LoRA, an approximation of the rank that you choose: peft.save_as_lora"
    cannot = r"and PEFT cannot convert it to LoRA: train one of .*LORA.* instead"
    with pytest.raises(ArtifactError, match=can if converts_to_lora(peft_type) else cannot) as caught:
        method_of(toy_artifact(toy_config(peft_type=peft_type)))
    assert (caught.value.code, caught.value.param) == ("method_unsupported", "peft_type")
    assert f"peft_type {peft_type} is not served" in str(caught.value)


def test_what_is_refused_by_name_is_peft_s() -> None:
    """No sentence is kept for a method that PEFT does not have, and the way that they name exists."""
    assert {kind.value for kind in PeftType} >= CONVERTIBLE | INCONVERTIBLE
    assert callable(peft.save_as_lora)


def converts_to_lora(peft_type: str) -> bool:
    """Whether any layer of a method's package says so, on a linear."""
    package = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)].__module__.rpartition(".")[0]
    on_linear = Mock(get_base_layer=lambda: nn.Linear(1, 1))
    return any(
        layer.supports_lora_conversion(on_linear)
        for layer in all_subclasses(BaseTunerLayer)
        if layer.__module__.startswith(f"{package}.")
    )


def all_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """Return every class that derives from a class."""
    for derived in kind.__subclasses__():
        yield derived
        yield from all_subclasses(derived)


@pytest.mark.parametrize("config", [{}, {"peft_type": None}, {"peft_type": ["LORA"]}])
def test_a_config_without_a_method_is_refused(config: dict[str, object]) -> None:
    """A config without a peft_type is refused: nothing is guessed."""
    with pytest.raises(ArtifactError, match="no peft_type"):
        method_of(toy_artifact(config))


def test_manifest_and_config_must_agree() -> None:
    """A manifest of another method than the config's is refused."""
    with pytest.raises(ArtifactError, match="the manifest says bottleneck, the config lora"):
        compile_patch(toy_artifact(manifest=toy_manifest(method="bottleneck")), toy_spec())


def test_no_more_is_compiled_than_the_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the limit an artifact is compiled; what would pass it is refused before the rest is computed."""
    whole = compile_patch(toy_artifact(), toy_spec())
    size = ItemBytes(2, 4)
    fits = compile_patch(toy_artifact(), toy_spec(), Room(size.of(whole), size))
    assert fits.num_items == whole.num_items
    made: list[Primitive] = []

    def compile_slowly(_artifact: Artifact, _spec: BaseSpec) -> Iterator[Primitive]:
        for primitive in whole.primitives:
            made.append(primitive)
            yield primitive

    monkeypatch.setattr(methods, "METHODS", {"LORA": Method("lora", compile_slowly)})
    first, second, *_ = map(size.of, whole.primitives)
    with pytest.raises(ArtifactError, match=rf"for toy, takes more than {first + second - 1} bytes") as caught:
        compile_patch(toy_artifact(), toy_spec(), Room(first + second - 1, size))
    assert (caught.value.code, len(made)) == ("artifact_too_large", 2)
