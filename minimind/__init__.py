"""MiniMind, step by step: a small Llama-style chat model, built and trained from nothing.

import minimind
result = minimind.train("pretrain", preset="course")
model, tokenizer = minimind.load("full_sft", out_dir="out/course")
minimind.chat(model, tokenizer, [{"role": "user", "content": "What is the job of Quin?"}])
"""

from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.generate import chat, generate
from minimind.interop import export_hf, load
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.trainer import TrainResult, train

__version__ = "0.1.0"
__all__ = [
    "MiniMind", "ModelConfig", "Tokenizer", "TrainResult", "UserError",
    "chat", "export_hf", "generate", "load", "train",
]  # fmt: skip
