"""A format that hfbatch does not have, as its author would write it: Arrow's IPC files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.data.formats.base import (
    Footer,
    Format,
    Parsed,
    Piece,
    Schemas,
    SourceFile,
    Types,
    Wanted,
)
from hfbatch.data.formats.parquetfiles import cut_groups


class ArrowFormat(Format):
    """Arrow files, cut at record batches."""

    title = "Arrow"
    lines = False
    typed = True
    nested = True
    scans = False

    def schemas(self, fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> Schemas:
        made = Schemas()
        for file in files:
            try:
                table = self.table(fs, f"{root}/{file.path}")
            except pa.ArrowInvalid as error:
                made.broken[file.path] = str(error)
                continue
            batches = table.to_batches()
            rows, sizes = (
                np.array(of, np.int64) for of in ([len(b) for b in batches], [b.nbytes for b in batches])
            )
            made.footers[file.path] = Footer(table.schema, rows, sizes)
        return made

    def cut(
        self,
        fs: pafs.FileSystem,
        path: str,
        file: SourceFile,
        footer: Footer | None,
        split_rows: int,
        limit: int | None,
    ) -> tuple[list[Piece], int]:
        assert footer is not None
        ranges = cut_groups(footer.rows.tolist(), footer.sizes.tolist(), split_rows)
        return [
            Piece(file.path, start, stop, file.size, file.mtime_ns) for start, stop, _ in ranges
        ], file.size

    def read(self, fs: pafs.FileSystem, path: str, piece: Piece, wanted: Wanted, most: int) -> Parsed:
        table = self.table(fs, path)
        names = [name for name in wanted.schema.names if name in table.column_names]
        return Parsed(table.select(names).slice(piece.start, piece.stop - piece.start))

    @staticmethod
    def table(fs: pafs.FileSystem, path: str) -> pa.Table:
        with fs.open_input_file(path) as file, pa.ipc.open_file(file) as opened:
            return opened.read_all()
