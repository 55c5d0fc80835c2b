"""The stages of training, one file each: row format, encoding, loss.

`STAGES` maps a stage's name to the function that makes its `Task` from the settings, the model
(with its starting weights, on its device) and the tokenizer.
"""

from minimind.stages.pretrain import pretrain_task
from minimind.stages.reason import reason_task
from minimind.stages.sft import sft_task

STAGES = {"pretrain": pretrain_task, "sft": sft_task, "reason": reason_task}
