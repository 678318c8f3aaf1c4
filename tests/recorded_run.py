"""A short run on the embedded pipeline, and the numbers of it that were recorded.

python tests/recorded_run.py OUT.json    # writes them; recorded_run.json has those of a version that is trusted
"""

import json
import runpy
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

RECORD = Path(__file__).with_suffix(".json")
CONFIG = Path(__file__).with_suffix(".yaml")


def numbers(run: Path) -> dict:
    """Metrics by row, scores of held-out pairs, and the trained weights as one norm a tensor, of a run's folder."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    held_out = json.loads((run / "heldout.json").read_text())
    return {
        "rows": [{k: v for k, v in row.items() if not k.startswith(("seconds/", "peak_memory"))} for row in rows],
        "before": held_out["before"],
        "after": held_out["after"],
        "norms": {name: weight.double().norm().item() for name, weight in sorted(weights.items())},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).parents[1] / "scripts" / "align.py"
        out = Path(sys.argv[1])
        sys.argv = [str(script), "--config", str(CONFIG), f"run.folder={folder}/run"]
        runpy.run_path(str(script), run_name="__main__")
        out.write_text(json.dumps(numbers(Path(folder, "run")), indent=1) + "\n")
