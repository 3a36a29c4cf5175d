"""Makes units and rows for tests."""

from pipeline.schema import ROW_SCHEMA, rows_table, units_table


def unit(id_, **values):
    base = {"kind": "video", "uris": ["a.mp4"], "prompts": [{"prompt_id": "p", "prompt": "?"}], "attempts": 0}
    return base | values | {"id": id_}


def units(*ids, **common):
    return units_table([unit(id_, **common) for id_ in ids])


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
    return dict.fromkeys(ROW_SCHEMA.names) | base | values


def rows(*values):
    return rows_table(list(values))
