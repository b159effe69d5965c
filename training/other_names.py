"""Names that other trainers have for options (TRL, transformers, PEFT, axolotl, LLaMA-Factory, OpenAI's fine-tuning).

People type them. Each is answered by the flag that means the same here, or by what holds instead of a flag.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from typer.core import TyperCommand

from training.errors import stop
from training.options import flag

FLAGS = {  # what is typed -> the option that means it
    **dict.fromkeys(("learning_rate", "learning_rate_multiplier", "peak_lr"), "lr"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs", "epoch"), "epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "num_train_steps", "train_steps", "iters"), "steps"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size", "micro_batch_size"),
        "batch_size",
    ),
    **dict.fromkeys(
        ("gradient_accumulation", "grad_accumulation_steps", "accumulate_grad_batches"), "gradient_accumulation_steps"
    ),
    **dict.fromkeys(("lora_r", "lora_rank", "rank", "lora_dim"), "r"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    **dict.fromkeys(("lora_target_modules", "lora_target", "target_linears"), "target_modules"),
    **dict.fromkeys(("layers_to_transform", "lora_layers"), "layers"),
    "use_rs_lora": "use_rslora",
    **dict.fromkeys(("output_dir", "output", "save_dir", "adapter_path"), "out"),
    **dict.fromkeys(("model_name_or_path", "model_name", "model_id", "model", "base_model"), "base"),
    **dict.fromkeys(
        (
            "dataset",
            "dataset_name",
            "dataset_path",
            "datasets",
            "train_data",
            "train_dataset",
            "train_file",
            "training_file",
        ),
        "data",
    ),
    **dict.fromkeys(("eval_dataset", "eval_file", "eval_data", "validation_file", "test_file", "val_data"), "eval"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "model_max_length"), "max_length"),
    **dict.fromkeys(
        ("peft_type", "peft_method", "finetuning_type", "fine_tune_type", "train_type", "adapter"), "method"
    ),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), "resume"),
    **dict.fromkeys(("random_seed", "data_seed"), "seed"),
    **dict.fromkeys(("torch_dtype", "dtype", "bf16", "fp16", "tf32", "mixed_precision"), "precision"),
    **dict.fromkeys(("device_map", "use_cpu", "no_cuda"), "device"),
    **dict.fromkeys(("prompt_tuning_init_text", "init_prompt"), "init_text"),
    **dict.fromkeys(("dataset_text_field", "input_column", "text_column"), "prompt_column"),
    **dict.fromkeys(("output_column", "response_column", "label_column"), "completion_column"),
    **dict.fromkeys(("chat_template", "prompt_template"), "template"),
    **dict.fromkeys(("adapter_dim", "reduction_factor"), "bottleneck_size"),
    **dict.fromkeys(("prefix_length", "num_soft_tokens"), "num_virtual_tokens"),
    "cache_dir": "cache",
    "suffix": "task",
}
FIXED = {  # what is typed -> what holds, since there is no such option
    **dict.fromkeys(("use_dora", "lora_dora"), "write --method dora"),
    **dict.fromkeys(("use_lora", "use_peft"), "an adapter is all that is trained, unless --method full"),
    **dict.fromkeys(("init_lora_weights", "lora_init"), "write --method pissa or --method olora"),
    "weight_decay": "there is no weight decay",
    **dict.fromkeys(("warmup_ratio", "warmup_steps", "num_warmup_steps"), "the rate rises in the first 8 % of a run"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "lr_schedule"), "the rate falls linearly to 5 % of --lr"),
    **dict.fromkeys(("optim", "optimizer"), "the optimizer is AdamW"),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), "the norm of gradients is cut at 1"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization"), "the base is trained on unquantised"),
    **dict.fromkeys(("packing", "sample_packing", "group_by_length"), "rows of like length share a batch, unpacked"),
    **dict.fromkeys(
        ("logging_steps", "logging_dir", "report_to", "wandb_project"), "each step is a line of train.jsonl in --out"
    ),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "write --eval-steps, or nothing for the end alone"),
    **dict.fromkeys(("save_strategy", "save_total_limit"), "write --save-steps; the last checkpoint alone is kept"),
    "load_best_model_at_end": "write --early-stopping-patience, which ends with the best weights",
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "write --push URL for a server of manyhats"),
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss", "train_on_inputs", "train_on_input", "mask_prompt"),
        "the loss is that of answers alone",
    ),
    **dict.fromkeys(("do_train", "do_eval", "trust_remote_code"), "leave it out"),
}


def hint_for(typed: str, own: set[str]) -> str | None:
    """Say what to write instead of a name without dashes, for a command with these options; None if it is not known."""
    name = typed.replace("-", "_")
    if name in own:
        return f"{typed} is written {flag(name)} here" if typed != name.replace("_", "-") else None
    if FLAGS.get(name) in own:
        return f"{typed} is {flag(FLAGS[name])} here"
    return f"there is no {typed}: {FIXED[name]}" if name in FIXED else None


class OtherNames(TyperCommand):
    """A command that answers other trainers' names of its options by a sentence, before it reads what is typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Exit with 1 at the first such name."""
        own = {parameter.name for parameter in self.params if parameter.name}
        for word in [] if ctx.resilient_parsing else args:  # a shell that completes asks, too
            typed = word.partition("=")[0]
            if typed.startswith("--") and (hint := hint_for(typed[2:], own)):
                raise stop(Console(stderr=True), f"{hint}.", str(self.name))
        if not ctx.resilient_parsing:
            self._check_once(ctx, args)
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def _check_once(self, ctx: Any, args: list[str]) -> None:
        """Exit with 1 at an option that is given twice, of which the first would be dropped."""
        _, _, given = self.make_parser(ctx).parse_args(args=[*args])
        options = [one for one in given if one.param_type_name == "option" and not one.multiple]
        if twice := next((one for one in options if options.count(one) > 1), None):
            reason = f"{twice.opts[0]} is given twice, and takes one value: which one counts?"
            raise stop(Console(stderr=True), reason, str(self.name))
