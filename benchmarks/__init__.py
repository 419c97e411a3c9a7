"""What measures, and writes the documents in docs/.

The Python models' plain modules are imported by name, as Triton does.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / folder) for folder in ("model_repository/unet/1", "model_repository/jobs/1")]
