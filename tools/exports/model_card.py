"""stub"""
from tools.exports.task import Exported, Task
def write_model_card(task: Task, exported: Exported) -> None:
    """stub"""
