"""One column of a Hub data set as a JSON-lines file, for the perplexity of held-out text.

Runs in the lmeval environment (datasets).

Request body: `text` (data set), `revision`, `config`, `split`, `field`, `key` (what the user calls
it), `join`, `output` (file).
Result body: `documents`.
"""

from __future__ import annotations

import json
from typing import Any

import datasets

from quantize.protocol import Events, Request, WorkerError, worker_main, write_atomic


def run(request: Request, events: Events) -> dict[str, Any]:
    """Download, keep the rows that have text (all of them if they are to be joined), write."""
    body = request.body
    rows = datasets.load_dataset(
        body["text"], body["config"], split=body["split"], revision=body["revision"]
    )
    if body["field"] not in rows.column_names:
        raise WorkerError(
            "SourceError",
            f"{body['text']} has no column {body['field']!r}",
            f"use one of {rows.column_names} as {body['key']}",
        )
    texts = [text for text in rows[body["field"]] if body["join"] or text.strip()]
    lines = (json.dumps({body["field"]: text}, ensure_ascii=False) + "\n" for text in texts)
    write_atomic(body["output"], "".join(lines))
    events.progress("held-out text", len(texts), len(texts), "documents")
    return {"documents": len(texts)}


if __name__ == "__main__":
    worker_main(run)
