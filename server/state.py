"""ServerState: the server's rooms, as the composition root gives them to the routes."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.storage.load_roots import LoadRoot
from server.engine.client import EngineClient
from server.metrics import Metrics
from server.requests.auth import Callers
from server.requests.rate_limits import RateLimiter
from server.requests.service import GenerationService
from server.requests.tokenizer import Tokenizer
from server.requests.usage import UsageBuffer
from server.requests.version_stats import Recent
from server.settings import Settings
from server.stores import Stores
from server.tenant_work import TenantWork
from server.uploads.preload import TreeImport
from server.uploads.retention import ArtifactRetention
from server.uploads.revalidation import Revalidation
from server.uploads.service import UploadService


@dataclass
class ServerState:
    """Rooms of the API process, nothing else; `is_draining` says that running requests may finish, and none begins."""

    settings: Settings
    client: EngineClient
    stores: Stores
    tokenizer: Tokenizer
    tenant_work: TenantWork
    metrics: Metrics
    callers: Callers
    rate_limiter: RateLimiter
    usage: UsageBuffer
    recent: Recent
    retention: ArtifactRetention
    revalidation: Revalidation
    generation: GenerationService
    uploads: UploadService
    imports: TreeImport
    load_roots: list[LoadRoot]
    is_draining: bool = False
