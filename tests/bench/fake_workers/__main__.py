"""A worker whose engines take the time that their settings say, by their own account, and misbehave on request."""

from __future__ import annotations

import json
import sys
import threading

KIND = sys.argv[1]
SETTINGS = json.loads(sys.argv[2])


def reply(**fields: object) -> None:
    print(json.dumps({**fields, "peak_bytes": 1 << 20, "anonymous_bytes": 1 << 19}), flush=True)


def spin() -> None:
    while True:
        pass


def main() -> None:
    print(f"{KIND} starts", file=sys.stderr)
    if KIND == "silent":
        return
    if KIND == "absent":
        reply(error="ModuleNotFoundError: No module named 'absent'")
        return
    reply(load_s=0.25, versions={KIND: "1.0"})
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "prefill":
                if KIND == "spinning":
                    threading.Thread(target=spin, daemon=True).start()
                reply(value=command["tokens"] / SETTINGS["options"]["speed"])
            case "decode":
                if KIND == "fragile":
                    print("out of luck", file=sys.stderr)
                    sys.exit(3)
                reply(value=command["steps"] / SETTINGS["options"]["speed"])
            case "encode":
                reply(value=[ord(letter) for letter in command["text"]])
            case "likeliest":
                first = SETTINGS["options"].get("first", 7)
                reply(value=[[first, 9.0], [8, 3.0]])


if __name__ == "__main__":
    main()
