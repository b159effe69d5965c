"""Tenants, keys, limits and the log of changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import AbsentError, NameTakenError, QuotaError
from adapters_store.registry import DEFAULT_TENANT
from adapters_store.registry.audit import act_as, acting
from adapters_store.registry.registry import Facts, Registry
from adapters_store.registry.tenants import TenantLimits, Tenants, hash_of, split_key

D1, D2, D3 = "1" * 64, "2" * 64, "3" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}").open()
    yield registry
    registry.close()


@pytest.fixture
def tenants(registry: Registry) -> Tenants:
    return Tenants(registry.engine)


def upload(registry: Registry, tenant: str, digest: str, num_bytes: int = 10, task: str = "t") -> None:
    facts = Facts(
        digest=digest,
        method="lora",
        num_parameters=1,
        num_items=1,
        num_matrix_items=1,
        num_virtual=1,
        num_bytes=num_bytes,
    )
    registry.add_version(tenant, task, facts)


def actions(tenants: Tenants, tenant: str | None = None) -> list[str]:
    return [entry.action for entry in reversed(tenants.changes(tenant, None, 100))]


def test_the_default_tenant_is_there(tenants: Tenants) -> None:
    """A new registry has the tenant `default`, without limits, and it cannot go."""
    assert [(tenant.name, tenant.limits) for tenant in tenants.all()] == [(DEFAULT_TENANT, TenantLimits())]
    with pytest.raises(ValueError, match="always there"):
        tenants.delete(DEFAULT_TENANT)


def test_a_name_is_given_once(tenants: Tenants) -> None:
    """A name that a tenant has, or had, is refused: what is kept of it could be taken for another's."""
    tenants.add("acme")
    with pytest.raises(NameTakenError, match=r"the tenant acme exists$"):
        tenants.add("acme")
    tenants.delete("acme")
    with pytest.raises(NameTakenError, match="acme was deleted"):
        tenants.add("acme")
    assert [tenant.name for tenant in tenants.all()] == [DEFAULT_TENANT]


def test_what_is_absent(tenants: Tenants) -> None:
    """Every call for a tenant that is not there, or not any more, says the same."""
    tenants.add("gone")
    tenants.delete("gone")
    for name in ("gone", "none"):
        calls: list[tuple[Any, tuple[object, ...]]] = [
            (tenants.get, (name,)),
            (tenants.delete, (name,)),
            (tenants.set_limits, (name, TenantLimits())),
            (tenants.add_key, (name, ["generate"])),
            (tenants.keys, (name,)),
            (tenants.rotate_key, (name, "mh_1")),
            (tenants.revoke_key, (name, "mh_1")),
        ]
        for call, arguments in calls:
            with pytest.raises(AbsentError, match=f"^there is no tenant {name}$"):
                call(*arguments)


def test_a_key_is_known_by_its_hash(tenants: Tenants, tmp_path: Path) -> None:
    """The secret is told once: the database has a hash of it and nothing else."""
    tenants.add("acme", TenantLimits(max_running=3))
    key, sent = tenants.add_key("acme", ["deploy", "generate", "deploy"], "ci")
    assert (key.tenant, key.scopes, key.note) == ("acme", ("deploy", "generate"), "ci")
    parts = split_key(sent)
    assert parts is not None and parts[0] == key.id and len(parts[1]) == 43
    known = tenants.known(key.id)
    assert known is not None and known.fits(parts[1]) and not known.fits("x" * 43)
    scopes = frozenset({"deploy", "generate"})
    assert (known.tenant, known.scopes, known.limits) == ("acme", scopes, TenantLimits(max_running=3))
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert hash_of(parts[1]).encode() in files and parts[1].encode() not in files


def test_no_two_keys_are_alike(tenants: Tenants) -> None:
    """Ids and secrets are drawn anew for each key."""
    sent = [tenants.add_key(DEFAULT_TENANT, ["generate"])[1] for _ in range(20)]
    assert len({part for key in sent for part in split_key(key) or ()}) == 40
    assert len(tenants.keys(DEFAULT_TENANT)) == 20


@pytest.mark.parametrize(
    "key", ["", "mh_", "mh_0123456789ab", "mh_0123456789ab.", "x" * 59, "mh_0123456789AB." + "x" * 43]
)
def test_what_is_no_key(key: str) -> None:
    """A text that does not have a key's form is not looked up."""
    assert split_key(key) is None


def test_rotate_and_revoke(tenants: Tenants) -> None:
    """A rotated key has its id and scopes and another secret; a revoked one is unknown."""
    key, first = tenants.add_key(DEFAULT_TENANT, ["deploy"])
    again, second = tenants.rotate_key(DEFAULT_TENANT, key.id)
    known = tenants.known(key.id)
    assert again == key and known is not None
    assert known.fits(second.partition(".")[2]) and not known.fits(first.partition(".")[2])
    tenants.revoke_key(DEFAULT_TENANT, key.id)
    assert tenants.known(key.id) is None and tenants.keys(DEFAULT_TENANT) == []
    with pytest.raises(AbsentError, match="has no key mh_"):
        tenants.revoke_key(DEFAULT_TENANT, key.id)


def test_a_foreign_key_is_absent(tenants: Tenants) -> None:
    """Another tenant's key can be neither rotated nor revoked; what is said is what is said of none."""
    tenants.add("a")
    tenants.add("b")
    key, _ = tenants.add_key("a", ["generate"])
    for call in (tenants.rotate_key, tenants.revoke_key):
        with pytest.raises(AbsentError, match=f"^the tenant b has no key {key.id}$"):
            call("b", key.id)
    assert tenants.known(key.id) is not None


def test_a_tenant_goes_whole(registry: Registry, tenants: Tenants) -> None:
    """Its keys, tasks and versions go with a tenant, another's stay; its usage stays for the bill."""
    tenants.add("acme")
    key, _ = tenants.add_key("acme", ["generate"])
    upload(registry, "acme", D1)
    upload(registry, "acme", D2, task="u")
    upload(registry, DEFAULT_TENANT, D3)
    registry.add_usages({("acme", "t", 1): (1, 2, 3)})
    assert sorted(tenants.delete("acme")) == [D1, D2]
    assert tenants.known(key.id) is None
    assert registry.tasks("acme") == [] and registry.digests() == {D3}
    assert [tenant for tenant, _ in registry.usages()] == ["acme"]


def test_an_upload_that_comes_too_late(registry: Registry, tenants: Tenants) -> None:
    """A tenant that was deleted while its upload came gets no version."""
    tenants.add("acme")
    tenants.delete("acme")
    with pytest.raises(AbsentError, match="no tenant acme"):
        upload(registry, "acme", D1)
    assert registry.digests() == set()


def test_limits_are_replaced(tenants: Tenants) -> None:
    """Limits that are set take the place of those before."""
    tenants.add("acme", TenantLimits(max_running=1, share=2.0))
    assert tenants.set_limits("acme", TenantLimits(requests_per_minute=5)).limits == TenantLimits(requests_per_minute=5)
    assert tenants.get("acme").limits == TenantLimits(requests_per_minute=5)


def test_room_for_adapters(registry: Registry, tenants: Tenants) -> None:
    """A version over the tenant's number or bytes is refused and not kept; the same bytes again are no new version."""
    tenants.add("acme", TenantLimits(max_adapters=2, max_bytes=100))
    upload(registry, "acme", D1, 60)
    with pytest.raises(QuotaError, match="has adapters of 60 bytes; 41 more are over its 100"):
        upload(registry, "acme", D2, 41)
    upload(registry, "acme", D2, 40)
    with pytest.raises(QuotaError, match="has 2 adapters and may have 2"):
        upload(registry, "acme", D3, 0, task="u")
    upload(registry, "acme", D1, 60)
    upload(registry, DEFAULT_TENANT, D3, 1000)
    found = tenants.get("acme")
    assert (found.num_adapters, found.num_bytes) == (2, 100)
    registry.delete_version("acme", "t", 1)
    upload(registry, "acme", D3, 0, task="u")
    assert [task.name for task in registry.tasks("acme")] == ["t", "u"]


def test_uploads_at_once_stay_within_the_quota(registry: Registry, tenants: Tenants) -> None:
    """Three of 8 concurrent uploads are accepted if there is room for 3."""
    tenants.add("acme", TenantLimits(max_adapters=3))
    refused: list[QuotaError] = []

    def one(number: int) -> None:
        try:
            upload(registry, "acme", f"{number:064d}")
        except QuotaError as error:
            refused.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5 and tenants.get("acme").num_adapters == 3


def test_every_change_has_its_line(registry: Registry, tenants: Tenants) -> None:
    """Each change is one line: who, what, when, in which request; newest first, by tenant, in pages; no secrets."""
    with acting("admin", "req-1"):
        tenants.add("acme")
        tenants.set_limits("acme", TenantLimits(max_adapters=9))
        key, first = tenants.add_key("acme", ["deploy"], "ci")
        _, second = tenants.rotate_key("acme", key.id)
    with acting(key.id, "req-2"):
        upload(registry, "acme", D1)
        upload(registry, "acme", D2)
        registry.delete_version("acme", "t", 1)
        registry.delete_task("acme", "t")
    with acting("admin"):
        tenants.revoke_key("acme", key.id)
        tenants.delete("acme")
    upload(registry, DEFAULT_TENANT, D1)
    keys = ["key.create", "key.rotate"]
    versions = ["version.add", "route.set"] * 2 + ["version.delete", "task.delete"]
    assert actions(tenants, "acme") == ["tenant.create", "limits.set", *keys, *versions, "key.revoke", "tenant.delete"]
    assert actions(tenants)[-2:] == ["version.add", "route.set"]
    newest, *_, oldest = tenants.changes(None, None, 100)
    assert (oldest.actor, oldest.request_id, oldest.what) == ("admin", "req-1", {"limits": {}})
    assert newest.actor == "server" and newest.request_id is None and newest.at >= oldest.at > 1.7e9
    by_key = [entry for entry in tenants.changes("acme", None, 100) if entry.actor == key.id]
    assert {entry.request_id for entry in by_key} == {"req-2"}
    assert {"task": "t", "version": 2, "digest": D2} in [entry.what for entry in by_key]
    page = tenants.changes("acme", newest.number - 2, 3)
    assert [entry.number for entry in page] == [newest.number - 3, newest.number - 4, newest.number - 5]
    text = repr(tenants.changes(None, None, 100))
    assert not any(secret in text for sent in (first, second) for secret in (split_key(sent) or ("", "?"))[1:])


def test_what_fails_leaves_no_line(registry: Registry, tenants: Tenants) -> None:
    """A change that is refused, or fails half-way, is not in the log: a line is written with its change."""
    tenants.set_limits(DEFAULT_TENANT, TenantLimits(max_adapters=0))
    before = actions(tenants)
    with pytest.raises(QuotaError):
        upload(registry, DEFAULT_TENANT, D1)
    with pytest.raises(AbsentError):
        registry.delete_task(DEFAULT_TENANT, "t")
    assert actions(tenants) == before


def test_an_actor_is_of_its_context(tenants: Tenants) -> None:
    """The actor is known in the context that set it, and not in threads started outside of it."""
    with acting("before"):
        act_as("admin")
        thread = threading.Thread(target=tenants.add, args=("b",))
        tenants.add("a")
        thread.start()
        thread.join()
    assert [entry.actor for entry in tenants.changes(None, None, 2)] == ["server", "admin"]


def test_usage_of_what_is_gone_is_forgotten(registry: Registry, tenants: Tenants) -> None:
    """Of what was last used before a time the usage goes of deleted versions, tasks and tenants, and no other."""
    for tenant in ("acme", "gone"):
        tenants.add(tenant)
        for task in ("t", "u"):
            upload(registry, tenant, D1, task=task)
            upload(registry, tenant, D2, task=task)
    places = [(tenant, task, number) for tenant in ("acme", "gone") for task in ("t", "u") for number in (1, 2)]
    registry.add_usages(dict.fromkeys([*places, ("acme", "base", 0), ("gone", "base", 0)], (1, 2, 3)))
    registry.delete_version("acme", "t", 1)
    registry.delete_task("acme", "u")
    tenants.delete("gone")
    assert registry.forget_usage(time.time() - 60) == 0
    assert registry.forget_usage(time.time() + 60) == 8
    left = [(tenant, used.task, used.version) for tenant, used in registry.usages()]
    assert left == [("acme", "base", 0), ("acme", "t", 2)]


def test_usage_is_written_whole(registry: Registry) -> None:
    """Counts of many tenants are written in one transaction, and add up over 32 bits."""
    big = 2**40
    for _ in range(2):
        registry.add_usages({("a", "t", 1): (1, big, 5), ("b", "base", 0): (2, 3, 4)})
    assert registry.usage("a")[0].prompt_tokens == 2 * big
    assert [tenant for tenant, _ in registry.usages()] == ["a", "b"]
    assert [tenant for tenant, _ in registry.usages("b")] == ["b"] and registry.usages("none") == []


def test_old_changes_are_forgotten(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes made before a time go from the log, and no others."""
    for second, name in enumerate(("first", "second", "third")):
        monkeypatch.setattr("adapters_store.registry.audit.time.time", lambda second=second: float(second))
        tenants.add(name)
    assert tenants.forget_changes(1.0) == 1
    assert [entry.tenant for entry in tenants.changes(None, None, 100)] == ["third", "second"]
    assert tenants.forget_changes(1.0) == 0
