"""The results of a study: one SQLite file with a row for each run.

The file is in WAL mode, each change is one short transaction, and a writer waits for others, so
that many processes may write and read it at the same time. Its schema is described in
docs/studies.md.
"""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...core.errors import InputError
from .condition import quoted, read_condition, require_column
from .expansion import Cell, StudyRun

TABLE_FILE, SCHEMA = "study.sqlite", "vitrim.study-table/1"
# Folders of the study folder: one run folder for each row, and the output of each run.
RUNS, LOGS = "runs", "logs"
WAIT_S = 60.0
State = Literal["waiting", "running", "trained", "done", "failed", "stopped"]
Kind = Literal["run", "axis", "figure"]
Row = dict[str, Cell]


@dataclass(frozen=True)
class Column:
    """One column of the table `runs`.

    Attributes:
        name: Its name.
        kind: `run` (identity and state), `axis` (a varied key of the recipe) or `figure`.
        type: SQLite's type; axes have none, since their values may be of any.
        meaning: With the unit.
        rising: Whether more is better.
    """

    name: str
    kind: Kind
    type: str
    meaning: str
    rising: bool = False


def declared(kind: Kind, lines: str) -> tuple[Column, ...]:
    """Columns from lines of name, type and meaning; `+` behind a type: more is better."""
    parts = [line.split(maxsplit=2) for line in lines.strip().splitlines()]
    return tuple(
        Column(name, kind, type_.rstrip("+"), meaning, type_.endswith("+"))
        for name, type_, meaning in parts
    )


RUN_COLUMNS = declared(
    "run",
    """
    id          TEXT     hash of the settings; the run folder is runs/ID
    number      INTEGER  place in the study, from 1
    seed        INTEGER  train.seed
    repetition  INTEGER  from 1; repetitions share their trainings
    state       TEXT     waiting, running, trained, done, failed or stopped
    reason      TEXT     why the run failed or stopped
    changed_at  TEXT     UTC time of the last change of the row
    """,
)
FIGURE_COLUMNS = declared(
    "figure",
    """
    top1              REAL+    test accuracy of the compact model, 0 to 1
    val_top1          REAL+    best validation accuracy of the fine-tuning, 0 to 1
    top1_dense        REAL+    test accuracy of the baseline, 0 to 1
    params            INTEGER  parameters of the compact model
    params_dense      INTEGER  parameters of the baseline
    macs              INTEGER  multiply-adds of the compact model for one image
    macs_dense        INTEGER  multiply-adds of the baseline for one image
    kept_attention    REAL     kept share of the parameters of attentions
    kept_ffn          REAL     kept share of the parameters of FFNs
    kept_first_half   REAL     the same of sub-layers in the first half
    kept_second_half  REAL     the same of those in the second half
    train_s           REAL     seconds of the trainings, shared ones included
    """,
)
BESIDE_COLUMNS = declared(
    "figure",
    """
    image         TEXT     height and width of the image in pixels
    params        INTEGER  parameters
    macs          INTEGER  multiply-adds for one image
    ms            REAL     median latency in milliseconds
    memory_bytes  INTEGER  memory beyond that of the runtime
    bytes         INTEGER  bytes of the files
    reason        TEXT     why there are no figures
    """,
)


class StudyTable:
    """The table of a study folder.

    Args:
        folder: The study folder.

    Raises:
        InputError: It has no table of this version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / TABLE_FILE
        if not self.path.is_file():
            raise InputError(
                f"{folder}: not a study folder (it has no {TABLE_FILE}); name one that "
                "`vitrim study FILE --out FOLDER` wrote"
            )
        try:
            found = self.facts().get("schema")
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path}: damaged ({error}); delete it, and --resume reads the finished runs "
                "again"
            ) from error
        if found != SCHEMA:
            raise InputError(
                f"{self.path}: not a table of this version (expected schema {SCHEMA!r}); name "
                "another folder"
            )

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, str]) -> StudyTable:
        """Create the table, or open the one that is there.

        Args:
            folder: The study folder, which exists.
            facts: Entries of the table `study`, such as its name.

        Returns:
            The table; new ones have no rows.
        """
        with contextlib.closing(_connected(folder / TABLE_FILE)) as link, _change(link):
            link.execute("CREATE TABLE IF NOT EXISTS study (key TEXT PRIMARY KEY, value TEXT)")
            link.execute(
                "CREATE TABLE IF NOT EXISTS columns (name TEXT PRIMARY KEY, kind TEXT, "
                "meaning TEXT, rising INTEGER)"
            )
            own = ", ".join(f"{quoted(column.name)} {column.type}" for column in RUN_COLUMNS)
            own = own.replace('"id" TEXT', '"id" TEXT PRIMARY KEY')
            link.execute(f"CREATE TABLE IF NOT EXISTS runs ({own})")
            beside = ", ".join(f"{quoted(column.name)} {column.type}" for column in BESIDE_COLUMNS)
            link.execute(f"CREATE TABLE IF NOT EXISTS beside (name TEXT PRIMARY KEY, {beside})")
            entries = {**facts, "schema": SCHEMA}.items()
            link.executemany("INSERT OR REPLACE INTO study VALUES (?, ?)", entries)
            _add_columns(link, (*RUN_COLUMNS, *FIGURE_COLUMNS))
        return cls(folder)

    def facts(self) -> dict[str, str]:
        """The entries of the table `study`: schema, name, about, source, recipe, toml."""
        with self._link() as link:
            if not _has_table(link, "study"):
                return {}
            return dict(link.execute("SELECT key, value FROM study").fetchall())

    def columns(self) -> list[Column]:
        """The columns in order: of the run, axes, figures."""
        with self._link() as link:
            rows = link.execute("SELECT name, kind, meaning, rising FROM columns ORDER BY rowid")
            found = [Column(name, kind, "", text, bool(up)) for name, kind, text, up in rows]
        order = ("run", "axis", "figure")
        return sorted(found, key=lambda column: order.index(column.kind))

    def add_runs(self, runs: Sequence[StudyRun]) -> None:
        """Add a row in state `waiting` for each run that has none."""
        axes = list(dict.fromkeys(key for run in runs for key in run.cells))
        names = ("id", "number", "seed", "repetition", "state", "changed_at", *axes)
        rows = [
            (
                *(run.id, run.number, run.seed, run.repetition, "waiting", _now()),
                *(run.cells.get(key) for key in axes),
            )
            for run in runs
        ]
        listed = ", ".join(map(quoted, names))
        with self._link() as link, _change(link):
            _add_columns(link, [Column(key, "axis", "", f"recipe key {key}") for key in axes])
            link.executemany(
                f"INSERT INTO runs ({listed}) VALUES ({', '.join('?' * len(names))}) "
                "ON CONFLICT (id) DO UPDATE SET number = excluded.number",
                rows,
            )

    def change(
        self,
        run_id: str,
        state: State,
        reason: str | None = None,
        figures: Mapping[str, Cell] | None = None,
        columns: Sequence[Column] = (),
    ) -> None:
        """Set the state of a run.

        Args:
            run_id: The run.
            state: The new state.
            reason: Why it failed or stopped.
            figures: Values by column.
            columns: Those of them that the table may not have yet.
        """
        values: dict[str, Cell] = {"state": state, "reason": reason, "changed_at": _now()}
        values |= figures or {}
        sets = ", ".join(f"{quoted(name)} = ?" for name in values)
        with self._link() as link, _change(link):
            _add_columns(link, columns)
            link.execute(f"UPDATE runs SET {sets} WHERE id = ?", (*values.values(), run_id))

    def restart(self, run_ids: Collection[str]) -> None:
        """Set runs to `waiting`, in one transaction."""
        sql = "UPDATE runs SET state = 'waiting', reason = NULL, changed_at = ? WHERE id = ?"
        with self._link() as link, _change(link):
            link.executemany(sql, [(_now(), run_id) for run_id in run_ids])

    def states(self) -> dict[str, State]:
        """The state of every run."""
        with self._link() as link:
            return dict(link.execute("SELECT id, state FROM runs ORDER BY number").fetchall())

    def rows(self, where: str | None = None, sort: str | None = None) -> list[Row]:
        """The rows as mappings from column to value.

        Args:
            where: A condition (`condition.read_condition`); default: all rows.
            sort: A column, the best value first; `-` before it: the worst first. Rows without a
                value are last. Default: the order of the study.

        Returns:
            The rows.

        Raises:
            InputError: The condition is invalid, or there is no such column.
        """
        columns = {column.name: column for column in self.columns()}
        sql, parameters = "1", ()
        if where is not None:
            condition = read_condition(where, columns)
            sql, parameters = condition.sql, condition.parameters  # type: ignore[assignment]
        order = quoted("number")
        if sort is not None:
            name = require_column(sort.removeprefix("-"), columns, "--sort")
            down = columns[name].rising != sort.startswith("-")
            order = f"{quoted(name)} {'DESC' if down else 'ASC'} NULLS LAST, {order}"
        listed = ", ".join(map(quoted, columns))
        with self._link() as link:
            found = link.execute(
                f"SELECT {listed} FROM runs WHERE {sql} ORDER BY {order}", parameters
            )
            return [dict(zip(columns, row, strict=True)) for row in found]

    def beside(self) -> list[Row]:
        """The models beside the study with their figures, in the order of measurement."""
        names = ("name", *(column.name for column in BESIDE_COLUMNS))
        with self._link() as link:
            # Tables of earlier versions have none.
            if not _has_table(link, "beside"):
                return []
            listed = ", ".join(map(quoted, names))
            found = link.execute(f"SELECT {listed} FROM beside ORDER BY rowid")
            return [dict(zip(names, row, strict=True)) for row in found]

    def set_beside(self, name: str, figures: Mapping[str, Cell]) -> None:
        """Set the figures of a model beside the study.

        Args:
            name: The model.
            figures: Values by column of `BESIDE_COLUMNS`; the others become empty.
        """
        values = [name, *(figures.get(column.name) for column in BESIDE_COLUMNS)]
        with self._link() as link, _change(link):
            marks = ", ".join("?" * len(values))
            link.execute(f"INSERT OR REPLACE INTO beside VALUES ({marks})", values)

    @contextlib.contextmanager
    def _link(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(_connected(self.path)) as link:
            yield link


def _connected(path: Path) -> sqlite3.Connection:
    # Transactions begin explicitly (_change), so that none holds a lock longer than it needs.
    link = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
    with contextlib.suppress(sqlite3.OperationalError):
        # A folder that cannot be written is read without it.
        link.execute("PRAGMA journal_mode = WAL")
    link.execute("PRAGMA synchronous = NORMAL")
    return link


@contextlib.contextmanager
def _change(link: sqlite3.Connection) -> Iterator[None]:
    """One transaction that waits for other writers."""
    link.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        link.execute("ROLLBACK")
        raise
    link.execute("COMMIT")


def _has_table(link: sqlite3.Connection, name: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return link.execute(query, (name,)).fetchone() is not None


def _add_columns(link: sqlite3.Connection, columns: Sequence[Column]) -> None:
    known = {row[1] for row in link.execute("PRAGMA table_info(runs)")}
    for column in columns:
        if column.name not in known:
            link.execute(f"ALTER TABLE runs ADD COLUMN {quoted(column.name)} {column.type}")
        link.execute(
            "INSERT OR IGNORE INTO columns VALUES (?, ?, ?, ?)",
            (column.name, column.kind, column.meaning, int(column.rising)),
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
