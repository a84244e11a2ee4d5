"""The layouts of LLaVA: its projector file; for LoRA runs its LoRA folder; for whole runs its whole folder."""

from __future__ import annotations
from model.exports import llava
from model.exports.trained_files import projector
from tools.exports.task import Exported, Task

def to_llava(task: Task) -> Exported:
    """Write LLaVA's own layout."""
    llava.check_exportable_llava(task.card)
    path = llava.write_projector(task.folder, projector(task.source, task.card))
    return Exported(f"(in LLaVA) python llava/train/train_mem.py --pretrain_mm_mlp_adapter {task.quoted(path.name)} ...", "x")
