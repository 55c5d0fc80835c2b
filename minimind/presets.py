"""What the small presets change: for every stage, then for each stage.

`course` gives the notebooks their results on a 2-core CPU in minutes, `tiny` proves in seconds that
the code runs. `full` changes nothing: it is the dataclasses' defaults, the guide's table.
"""

_MODEL = dict(qk_norm=True, rope_theta=1e4, num_attention_heads=4, max_seq_len=128)
_COURSE_RUN = dict(_MODEL, out_dir="out/course", dtype="auto", adam_beta2=0.99, batch_size=24, warmup_steps=30,
                   weight_decay=0.1)  # fmt: skip
_COURSE = dict(_COURSE_RUN, hidden_size=128, num_hidden_layers=4)
_TINY_RUN = dict(_MODEL, out_dir="out/tiny", dtype="float32", batch_size=8, warmup_steps=5, log_interval=2,
                 save_interval=20)  # fmt: skip
_TINY = dict(_TINY_RUN, hidden_size=64, num_hidden_layers=2)

# What a stage needs in both.
_PRETRAIN = dict(learning_rate=3e-3, optimizer="muon", accumulation_steps=1)
_LORA = dict(lora_r=4, lora_alpha=8, target_modules=("gate_proj", "up_proj", "down_proj"))
_DISTILL = dict(learning_rate=1e-3, alpha=0.2, temperature=4.0, student_from_teacher=1)

PRESETS: dict[str, dict[str, dict]] = {
    "full": {},
    "course": {
        "pretrain": dict(_COURSE, **_PRETRAIN, epochs=2.4),
        "sft": dict(_COURSE, learning_rate=5e-4, epochs=2.5, batch_size=32),
        "lora": dict(_COURSE, **_LORA, learning_rate=3e-3, epochs=4, batch_size=32),
        "dpo": dict(_COURSE, learning_rate=8e-5, epochs=1, batch_size=16, sft_coef=1.0),
        "reward": dict(_COURSE, learning_rate=3e-4, epochs=1, batch_size=16),
        "reason": dict(_COURSE, learning_rate=1e-3, epochs=2, batch_size=32),
        "grpo": dict(_COURSE, learning_rate=1e-4, epochs=0.5, batch_size=16, max_new_tokens=80, beta=0.0),
        "spo": dict(_COURSE, learning_rate=1e-4, epochs=2, batch_size=128, accumulation_steps=1,
                    max_new_tokens=80, d_half=2e-4),
        "distill": dict(_COURSE_RUN, **_DISTILL, epochs=15, batch_size=32, teacher_preset="course",
                        teacher_hidden_size=128, teacher_num_layers=4, student_hidden_size=128, student_num_layers=3),
    },
    "tiny": {
        "pretrain": dict(_TINY, **_PRETRAIN, epochs=0.02),
        "sft": dict(_TINY, learning_rate=1e-3, epochs=0.05),
        "lora": dict(_TINY, **_LORA, learning_rate=1e-3, epochs=0.2),
        "dpo": dict(_TINY, learning_rate=1e-4, epochs=0.2, sft_coef=1.0),
        "reward": dict(_TINY, learning_rate=1e-3, epochs=0.2),
        "reason": dict(_TINY, learning_rate=1e-3, epochs=0.05),
        "grpo": dict(_TINY, learning_rate=1e-4, epochs=0.01, batch_size=2, num_generations=4, max_new_tokens=16),
        "spo": dict(_TINY, learning_rate=1e-4, epochs=0.02, accumulation_steps=1, max_new_tokens=16),
        "distill": dict(_TINY_RUN, **_DISTILL, epochs=0.2, teacher_preset="tiny", teacher_hidden_size=64,
                        teacher_num_layers=2, student_hidden_size=64, student_num_layers=1),
    },
}  # fmt: skip
