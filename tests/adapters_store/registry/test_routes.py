"""Routes: shares by weight, users that stay, the way back, and what a task's deletion leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.errors import AbsentError, NoEarlierRouteError
from adapters_store.registry.registry import Registry
from adapters_store.registry.routes import MAX_HISTORY, Route
from tests.adapters_store.registry.test_registry import D1, D2, D3, add

USERS = [f"user-{number}" for number in range(2000)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry with versions 1, 2 and 3 of the task t; 3 is its route."""
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}").open()
    for digest in (D1, D2, D3):
        add(registry, digest)
    yield registry
    registry.close()


def weights(registry: Registry) -> dict[int, float]:
    return registry.task("default", "t").route.weights


def test_shares_are_those_of_the_weights() -> None:
    """Each version gets the share of the line [0, 1) that its weight is of all; no weight is no place."""
    route = Route({4: 5, 3: 95})
    assert Counter(route.choose(place / 1000) for place in range(1000)) == {3: 950, 4: 50}
    assert Route({7: 0.1}).choose(1 - 2**-53) == 7
    assert Route().choose(0.5) is None


def test_requests_are_shared_out(registry: Registry) -> None:
    """Requests without a user, and those of a route that is not sticky, fall by the weights."""
    registry.set_route("default", "t", Route({1: 1, 3: 3}))
    got = Counter(registry.resolve("default", "t", user="always me").number for _ in range(600))
    assert set(got) == {1, 3} and 90 < got[1] < 210


def test_a_sticky_user_stays(registry: Registry) -> None:
    """The same user gets the same version; users fall by the weights, in each task in another way."""
    route = Route({1: 90, 3: 10}, sticky="user")
    registry.set_route("default", "t", route)
    first = registry.resolve("default", "t", user="me").number
    assert {registry.resolve("default", "t", user="me").number for _ in range(50)} == {first}
    got = Counter(route.choose(route.place("default", "t", user)) for user in USERS)
    assert 140 < got[3] < 260
    assert len({route.place("default", task, "me") for task in ("t", "u", "v")}) == 3
    assert len({route.place("default", "t", None) for _ in range(3)}) == 3, "without a user: anywhere"


def test_users_stay_with_a_canary_that_grows() -> None:
    """A user who gets the newest version at 5% gets it at 20% and 100% too."""
    routes = [Route({1: 100 - share, 3: share}, "user") for share in (5, 20, 99)]
    canaries = [{user for user in USERS if route.choose(route.place("d", "t", user)) == 3} for route in routes]
    assert canaries[0] < canaries[1] < canaries[2]


def test_a_route_to_nowhere_changes_nothing(registry: Registry) -> None:
    """A version that the task does not have is named, and the route stays."""
    with pytest.raises(AbsentError, match="no version 9"):
        registry.set_route("default", "t", Route({1: 50, 9: 50}))
    with pytest.raises(AbsentError, match="no task u"):
        registry.set_route("default", "u", Route({1: 100}))
    assert weights(registry) == {3: 100}


def test_a_rollback_goes_back_step_by_step(registry: Registry) -> None:
    """Each rollback is to the route before; at the first route there is none, and it stays."""
    registry.set_route("default", "t", Route({2: 95, 3: 5}, "user"))
    registry.set_route("default", "t", Route({2: 95, 3: 5}, "user"))  # the same is no new one
    assert registry.roll_back("default", "t") == Route({3: 100})
    assert registry.roll_back("default", "t").weights == {2: 100}
    assert registry.roll_back("default", "t").weights == {1: 100}
    with pytest.raises(NoEarlierRouteError, match="task t"):
        registry.roll_back("default", "t")
    assert weights(registry) == {1: 100}
    registry.set_route("default", "t", Route({3: 1}))
    assert registry.roll_back("default", "t").weights == {1: 100}


def test_a_rollback_passes_what_is_gone(registry: Registry) -> None:
    """Deleted versions are no part of an earlier route; one that had no others is passed over."""
    registry.set_route("default", "t", Route({1: 50, 2: 50}))
    registry.set_route("default", "t", Route({3: 100}))
    registry.delete_version("default", "t", 2)
    assert registry.roll_back("default", "t").weights == {1: 50}
    with pytest.raises(NoEarlierRouteError):  # 3 is there still, but the routes to 3 and 1 came before
        registry.delete_version("default", "t", 3)
        registry.roll_back("default", "t")
    with pytest.raises(AbsentError):
        registry.roll_back("default", "u")


def test_the_history_is_bounded(registry: Registry) -> None:
    """However often a task is routed anew, as many routes are kept as `MAX_HISTORY`."""
    for turn in range(MAX_HISTORY + 20):
        registry.set_route("default", "t", Route({1 + turn % 2: 1 + turn}))
    for _ in range(MAX_HISTORY - 1):
        registry.roll_back("default", "t")
    with pytest.raises(NoEarlierRouteError):
        registry.roll_back("default", "t")


def test_pins_follow_the_route(registry: Registry) -> None:
    """A pinned task pins the versions that it routes to, and no others; a task that is created again is not pinned."""
    add(registry, D1, "other")
    assert registry.pinned_digests() == []
    registry.set_pinned("default", "t", True)
    assert registry.task("default", "t").is_pinned and registry.pinned_digests() == [D3]
    registry.set_route("default", "t", Route({1: 5, 2: 95}))
    assert registry.pinned_digests() == [D2, D1]
    registry.set_pinned("default", "t", False)
    assert registry.pinned_digests() == []
    registry.set_pinned("default", "t", True)
    registry.delete_task("default", "t")
    add(registry, D1)
    assert registry.pinned_digests() == []
    with pytest.raises(AbsentError):
        registry.set_pinned("default", "u", True)


def test_what_was_deleted_is_known(registry: Registry) -> None:
    """Deleted bytes are remembered for the task, with the task and alone, until they are uploaded again."""
    registry.delete_version("default", "t", 1)
    assert registry.was_removed("default", "t", D1) and not registry.was_removed("default", "t", D2)
    registry.delete_task("default", "t")
    assert all(registry.was_removed("default", "t", digest) for digest in (D1, D2, D3))
    assert not registry.was_removed("default", "u", D1) and not registry.was_removed("theirs", "t", D1)
    add(registry, D1)
    assert not registry.was_removed("default", "t", D1) and registry.was_removed("default", "t", D2)


def test_a_registry_has_an_identity(registry: Registry, tmp_path: Path) -> None:
    """The identity is drawn once, and another registry has another."""
    other = Registry(f"sqlite:///{tmp_path / 'other.db'}").open()
    assert registry.identity() == registry.identity() != other.identity()
    other.close()
