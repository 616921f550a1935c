"""A small language model with weights and tasks: real log-probabilities offline, on any CPU.

>>> from ec_agents.embedded import EmbeddedChatModel, make_tasks
>>> task = make_tasks("solve", 1)[0]
>>> message = EmbeddedChatModel(seed=0).invoke(task.prompt)
>>> solved = task.check(message.text)
"""

from ec_agents.embedded.chat_model import EmbeddedChatModel
from ec_agents.embedded.tasks import FAMILIES, Task, make_task, make_tasks

__all__ = ["FAMILIES", "EmbeddedChatModel", "Task", "make_task", "make_tasks"]
