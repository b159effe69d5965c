"""Find the linears that an artifact acts on, each with exactly the tensors that config and base imply."""

from __future__ import annotations

from collections.abc import Callable, Collection

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.errors import MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.expect import PREFIX, by_site, expect_exactly
from adapters_store.methods.shared.targets import Targets, check_targets

Shapes = Callable[[str, LinearSite], dict[str, list[int]]]


def linears_of(
    artifact: Artifact,
    config: Targets,
    spec: BaseSpec,
    ends: Collection[str],
    shapes: Shapes,
    takes_conv1d: bool = False,
) -> list[str]:
    """Return the sites that have tensors, in the base's order. Raises `ArtifactError`.

    `shapes(site, linear)` gives the shapes of a site's tensors by the ends of their names, and `ends` are all ends that
    it can give. Conv1D layers are refused unless `takes_conv1d`.
    """
    sites = by_site(artifact, tuple(ends), spec.linears, spec.name)
    if not takes_conv1d and (transposed := [site for site in sites if spec.linears[site].is_transposed]):
        name = next(name for name in artifact.tensors if name.startswith(f"{PREFIX}{transposed[0]}."))
        raise MethodUnsupportedError(f"{name} acts on a Conv1D, for which PEFT does not have this method", name)
    expected = {PREFIX + site + end: need for site in sites for end, need in shapes(site, spec.linears[site]).items()}
    expect_exactly(artifact, expected)

    def a_tensor(site: str) -> str:
        return PREFIX + site + next(iter(shapes(site, spec.linears[site])))

    check_targets(config, sites, spec.linears, spec, a_tensor)
    return list(sites)


def is_low_rank(rank: int, linear: LinearSite) -> bool:
    """Tell if an update of this rank has fewer numbers as two factors than in full."""
    return rank * (linear.in_features + linear.out_features) < linear.in_features * linear.out_features
