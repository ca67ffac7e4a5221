"""Records of test outcomes: one JSON object per line, appended, so that a process that is killed loses none."""

import json
import os


def read(path):
    """Returns the lines of a record. A process that was killed can leave half a line at the end."""
    if not path or not os.path.exists(path):
        return []
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except ValueError:
                pass
    return lines


def append(path, *lines):
    """Appends lines to a record."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
