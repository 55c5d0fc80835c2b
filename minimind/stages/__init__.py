"""The stages of training, one file each: row format, encoding, loss.

`STAGES` maps a stage's name to the function that makes its `Task` from the settings, the model
(with its starting weights, on its device) and the tokenizer. `NEEDS` maps a stage to the function
that names the runs (stage, settings) which must come first, if what they make is absent.
`TOKENIZERS` maps a stage to the function that finds the tokenizer of a run which starts from
nothing and names none.
"""

from minimind.stages.distill import distill_task, missing_teacher, teacher_tokenizer
from minimind.stages.dpo import dpo_task
from minimind.stages.grpo import grpo_task
from minimind.stages.lora import lora_task
from minimind.stages.pretrain import pretrain_task, text_tokenizer
from minimind.stages.reason import reason_task
from minimind.stages.reward import reward_task
from minimind.stages.sft import sft_task
from minimind.stages.spo import spo_task

STAGES = {
    "pretrain": pretrain_task,
    "sft": sft_task,
    "lora": lora_task,
    "dpo": dpo_task,
    "reward": reward_task,
    "reason": reason_task,
    "grpo": grpo_task,
    "spo": spo_task,
    "distill": distill_task,
}
NEEDS = {"distill": missing_teacher}
TOKENIZERS = {"pretrain": text_tokenizer, "distill": teacher_tokenizer}
