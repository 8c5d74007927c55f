"""How a Mono-InternVL is born and moved: expand a dense decoder into the MoE, convert between layouts, publish.

families.py  the dense models that can be expanded, as data; templates/ are their prompts
source.py    reads a checkpoint of any layout a piece at a time
plan.py      what to write, as data: name, shape, dtype, operation and source tensors of every output
writer.py    carries a plan out: streams shards, resumes, renames the finished folder
manifest.py  what a checkpoint was made of and consists of, and whether that is so
verify.py    runs both checkpoints one layer at a time and compares
tokenizer.py a base's tokenizer with our tokens, and its chat template
files.py     what else lies beside the weights: config, remote code, model card
publish.py   the Hub
expand.py, convert.py   the two jobs
"""

from .convert import convert_checkpoint
from .expand import expand_checkpoint
from .job import Report
from .manifest import check_checkpoint
from .publish import publish_checkpoint
from .verify import Differences


__all__ = [
    "Differences",
    "Report",
    "check_checkpoint",
    "convert_checkpoint",
    "expand_checkpoint",
    "publish_checkpoint",
]
