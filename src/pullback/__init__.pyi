# SPDX-License-Identifier: Apache-2.0
from pullback.engine.backup import BackupRequest as BackupRequest
from pullback.engine.backup import BackupResult as BackupResult
from pullback.engine.backup import run_backup as run_backup
from pullback.engine.domain import Changes as Changes
from pullback.engine.domain import Checkpoint as Checkpoint
from pullback.engine.domain import Domain as Domain
from pullback.engine.domain import DomainAddress as DomainAddress
from pullback.engine.domain import open_domain as open_domain
from pullback.engine.exporting import Export as Export
from pullback.engine.freezing import Snapshot as Snapshot
from pullback.engine.restore import Restore as Restore
from pullback.engine.restore import RestoreRequest as RestoreRequest
from pullback.engine.restore import RestoreResult as RestoreResult
from pullback.nbd.address import TcpAddress as TcpAddress
from pullback.nbd.address import UnixAddress as UnixAddress
from pullback.nbd.address import parse_uri as parse_uri
from pullback.nbd.blocking import NbdConnection as NbdConnection
from pullback.repository.location import open_store as open_store
from pullback.repository.repository import Repository as Repository

__version__: str
