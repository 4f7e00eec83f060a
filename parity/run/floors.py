"""What was measured on the references and the oracle, kept beside their traces for the second try of a candidate.

An entry of the cache (cache.py) is named by the entries of the two traces that were compared, by the dtype, by the code
that measures and by the machine; so a trace that is not kept has no floor that is.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from parity.measure.evidence import Kept
from parity.measure.metrics import LogitRows, Measured, OracleRows, Place, TapError
from parity.run.cache import TraceCache, hash_code, machine
from parity.trace import Trace

T = TypeVar("T")
Tables = dict[str, Tensor]

CODE = Path(__file__).resolve().parents[1] / "measure"
SUMS = ("error", "expected", "worst", "drift")
ROWS = ("argmax", "margin", "log_norm", "negentropy")
FILE, INDEX = "measured.safetensors", "trace.json"  # the cache asks for the second of every entry


@dataclass
class StoredFloors(Kept):
    """Measurements of traces whose entries are known, looked up before they are made. `keys`: by a trace's label."""

    cache: TraceCache
    keys: Mapping[str, str | None]
    folder: Path  # of the run: what is read is linked there, what is written is written there first
    lock: Any = field(default_factory=Lock, repr=False)
    about: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.about = {"code": hash_code(CODE), "machine": machine()}

    def __getstate__(self) -> dict[str, Any]:
        """Another process has its own lock."""
        return {**self.__dict__, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=Lock())

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        entry = None if key in self._found else self._entry(key)
        if entry is None:
            return super().once(key, make)
        return super().once(key, lambda: self._read_or_make(key, entry, make))

    def _entry(self, key: tuple[Any, ...]) -> str | None:
        """The entry of a measurement; None of one that is not kept."""
        traces = {"measured": ["oracle", *(part.folder.name for part in key if isinstance(part, Trace))]}
        traces["oracle rows"] = ["oracle"]
        entries = [self.keys.get(label) for label in traces.get(key[0], [])]
        if not entries or None in entries:
            return None
        said = [part for part in key if isinstance(part, str)]
        what = {"what": said, "of": entries, **self.about}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _read_or_make(self, key: tuple[Any, ...], entry: str, make: Callable[[], T]) -> T:
        pack, unpack = FORMS[key[0]]
        out = self.folder / f"floor-{entry[:16]}"
        with self.lock:
            found = self.cache.restore(entry, out)
        if found:
            kept: T = unpack(json.loads((out / INDEX).read_text()), load_file(out / FILE))
            return kept
        made = make()
        said, tables = pack(made)
        out.mkdir(exist_ok=True)
        save_file({name: table.contiguous().clone() for name, table in tables.items()}, out / FILE)
        (out / INDEX).write_text(json.dumps(said))
        try:
            with self.lock:
                self.cache.keep(entry, out)
        except OSError:  # said of the traces already
            shutil.rmtree(out, ignore_errors=True)
        return made


# --- As files --------------------------------------------------------------------------------------------------------


def pack_measured(of: Measured) -> tuple[dict[str, Any], Tables]:
    tables, taps = Tables(), {}
    for tap, error in of.taps.items():
        place = asdict(error.place) if error.place else None
        counts = {kind: len(getattr(error, kind)) for kind in SUMS}
        taps[tap] = {"width": error.width, "largest": error.largest, "place": place, "counts": counts}
        tables |= {f"{tap}/{kind}/{i}": x for kind in SUMS for i, x in enumerate(getattr(error, kind))}
    for i, rows in enumerate(of.rows):
        tables |= {f"rows/{i}/kl": rows.kl, f"rows/{i}/argmax": rows.argmax}
    return {"taps": taps, "rows": len(of.rows), "missing": of.missing, "broken": of.broken}, tables


def unpack_measured(said: dict[str, Any], tables: Tables) -> Measured:
    taps = {}
    for tap, about in said["taps"].items():
        sums = {kind: [tables[f"{tap}/{kind}/{i}"] for i in range(n)] for kind, n in about["counts"].items()}
        place = about["place"] and Place(**{**about["place"], "index": tuple(about["place"]["index"])})
        taps[tap] = TapError(**sums, width=about["width"], place=place, largest=about["largest"])
    rows = [LogitRows(tables[f"rows/{i}/kl"], tables[f"rows/{i}/argmax"]) for i in range(said["rows"])]
    return Measured(taps, rows, said["missing"], said["broken"])


def pack_rows(of: list[OracleRows]) -> tuple[dict[str, Any], Tables]:
    return {"rows": len(of)}, {f"{i}/{kind}": getattr(rows, kind) for i, rows in enumerate(of) for kind in ROWS}


def unpack_rows(said: dict[str, Any], tables: Tables) -> list[OracleRows]:
    return [OracleRows(*(tables[f"{i}/{kind}"] for kind in ROWS)) for i in range(said["rows"])]


FORMS: dict[str, tuple[Callable[[Any], tuple[dict[str, Any], Tables]], Callable[[dict[str, Any], Tables], Any]]] = {
    "measured": (pack_measured, unpack_measured),
    "oracle rows": (pack_rows, unpack_rows),
}
