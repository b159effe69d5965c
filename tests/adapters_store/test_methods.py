"""What every method shares: an artifact's method and base are checked before anything of it is used."""

from __future__ import annotations

import pytest

from adapters_store.artifact import BaseRef
from adapters_store.errors import ArtifactError
from adapters_store.methods import METHODS, compile_patch, method_of
from tests.adapters_store.forge import (
    OTHER_IDENTITY,
    WEIGHTS_DIGEST,
    toy_artifact,
    toy_config,
    toy_manifest,
    toy_spec,
)


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


@pytest.mark.parametrize(
    "peft_type", [name for name in ("IA3", "PREFIX_TUNING", "lora", "NOPE") if name not in METHODS]
)
def test_a_method_that_is_not_served_is_refused_by_name(peft_type: str) -> None:
    """An unknown peft_type is refused, and what is served is listed."""
    with pytest.raises(ArtifactError, match=f"peft_type {peft_type} is not served; served are LORA") as caught:
        compile_patch(toy_artifact(toy_config(peft_type=peft_type)), toy_spec())
    assert caught.value.code == "method_unsupported"


@pytest.mark.parametrize("config", [{}, {"peft_type": None}, {"peft_type": ["LORA"]}])
def test_a_config_without_a_method_is_refused(config: dict[str, object]) -> None:
    """Without a peft_type nothing is guessed."""
    with pytest.raises(ArtifactError, match="no peft_type"):
        method_of(toy_artifact(config))


def test_manifest_and_config_must_agree() -> None:
    """A manifest of another method than the config's is refused."""
    with pytest.raises(ArtifactError, match="the manifest says bottleneck, the config lora"):
        compile_patch(toy_artifact(manifest=toy_manifest(method="bottleneck")), toy_spec())
