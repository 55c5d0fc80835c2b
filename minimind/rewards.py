# SHIM
import re


def answer_of(text):
    m = re.search(r"<answer>(.*?)</answer>", text)
    return m and m.group(1).strip()


def exact(text, right):
    return float(answer_of(text) == right)
