"""Units and rows for tests of what happens around them."""

from pipeline.schema import rows_table, units_table


def units(*ids, **common):
    base = {"kind": "video", "uris": ["a.mp4"], "prompts": [{"prompt_id": "p", "prompt": "?"}], "attempts": 0}
    return units_table([base | common | {"id": id_} for id_ in ids])


def row(id_, status="ok", **values):
    base = {
        "run_id": "r",
        "id": id_,
        "uri": f"{id_}.mp4",
        "uris": [f"{id_}.mp4"],
        "status": status,
        "attempts": 1,
        "model": "m",
        "code_version": "c",
        "config_hash": "h",
    }
    if status == "error":
        base |= {"error_stage": "decode", "error_type": "Broken", "error_message": "bad"}
    return base | values


def rows(*values):
    return rows_table(list(values))
