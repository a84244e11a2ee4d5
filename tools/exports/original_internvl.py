"""stub"""
from tools.exports.task import Exported, Task
def to_internvl(task: Task) -> Exported:
    """stub"""
    raise NotImplementedError
