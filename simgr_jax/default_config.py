"""Every option, with its default. The files in `configs/` start from these defaults.

A model's own options are documented in its module: `config.simgr` is `simgr_jax.models.simgr.Options`, and so on. The
groups below are shared. Each model reads only some of their keys; overriding a key that it does not read is an error
(see `simgr_jax.config_keys`).
"""

from __future__ import annotations

import ml_collections

from simgr_jax.models import registry


def get_config() -> ml_collections.ConfigDict:
    """All keys that exist. A config file or an override can't add others."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            # The folder that keeps prepared data and semantic IDs; "" is WORKDIR/cache. Runs that share it share work.
            "cache_dir": "",
            # One of `simgr_jax.models.registry.MODELS`. Its own options are in the group that has its name.
            "model": "simgr",
            **registry.default_options(),
            "data": {
                # "p5", "lcrec", "minionerec", "recbole", "log", "amazon_reviews" or "synthetic" (docs/data.md).
                "format": "p5",
                "path": "",
                # The dataset's name in reports; "" takes the folder's name.
                "name": "",
                # Removes users and items with fewer interactions than this, until all have enough; 0 keeps all.
                "k_core": 0,
                # "leave_one_out", "temporal" (shares of the interactions, by time) or "given" (as published).
                "split": "leave_one_out",
                # Shares of a temporal split.
                "validation_fraction": 0.1,
                "test_fraction": 0.1,
                # The model sees this many of a history's newest items; longer training sequences are cut into windows.
                "max_items": 20,
                # Format "log": the columns of the file, and a file of item texts if there is one.
                "log": {
                    "user": "user",
                    "item": "item",
                    "timestamp": "timestamp",
                    # What is between two fields of a CSV file, e.g. ";"; "" goes by its header.
                    "separator": "",
                    # Whether quoted fields of CSV files may hold line ends. If not, a quote that is never closed can't
                    # take in the rows after it.
                    "multiline": False,
                    "items_file": "",
                    "items_id": "item",
                    "items_text": ("title",),
                    # Whether the catalog also holds the items of `items_file` that no interaction is left of, so that
                    # they can be recommended.
                    "keep_cold_items": False,
                    # Which rows count, like 'event = "purchase" and rating >= 4'; "" for all.
                    "where": "",
                },
                # Format "recbole": the columns of `*.inter`; "" looks for the names that published files use.
                "recbole": {"user": "", "item": "", "timestamp": ""},
                # Format "amazon_reviews": version "2014", "2018" or "2023", category as in the file names.
                "amazon_reviews": {"version": "2023", "category": "All_Beauty"},
                # Format "synthetic": the size of the generated shop.
                "synthetic": {"num_users": 6000, "num_items": 1200, "seed": 0},
            },
            "semantic_ids": {
                # "fit" learns them from embeddings; "given" takes the dataset's own (`*.index.json`).
                "source": "fit",
                "embeddings": {
                    # Any of "tfidf", "text_encoder", "llm" (see item_reader), "npy", "interactions" (training
                    # interactions only), concatenated.
                    "names": ("tfidf",),
                    # One factor for each name; () is all one.
                    "weights": (),
                    "dim": 256,
                    # "text_encoder": a sentence-transformers or Hugging Face encoder, as a folder or a hub id
                    # (pip install simgr_jax[text]).
                    "encoder": "",
                    "npy_path": "",
                    # "interactions": two items of a sequence up to this many places apart count as neighbors.
                    "window": 5,
                },
                "quantizer": {
                    # "residual_kmeans", "rqvae", "opq" or "pq".
                    "name": "opq",
                    "levels": 32,
                    "codebook_size": 256,
                    "rqvae": {
                        "steps": 1500,
                        "batch_size": 1024,
                        "learning_rate": 2e-3,
                        "hidden_widths": (512, 256),
                        "latent_dim": 64,
                        "commitment": 0.25,
                    },
                },
                # Items with equal codes: "level" tells them apart by one more level, "keep" lets them tie.
                "collisions": "level",
            },
            # How an LLM reads the items' texts, for "llm" in semantic_ids.embeddings.names, backbone.token_init=reading
            # and simgr.item_text.
            "item_reader": {
                # A Hugging Face decoder: a folder, or a hub id. "" is backbone.checkpoint.
                "checkpoint": "",
                # The share of its layers that the LLM reads with, from the first. Early layers know the words, which
                # is what items have in common, and cost less (docs/item_texts.md).
                "depth": 0.25,
                # Texts are cut to this many of the LLM's tokens.
                "max_tokens": 64,
                # The states' directions are divided by their deviation to this power: 0 leaves them, 1 whitens.
                "whitening": 0.5,
                # The rank of the adapters with which it is trained (simgr.item_text=trained).
                "lora_rank": 16,
            },
            # How an LLM reads a history, for models that read tokens.
            "prompt": {
                # Text before the first item.
                "prefix": "",
                # The text of one item. It ends with {codes}, where the user's state is read; before it, an LLM can read
                # text and the item's {title}: "\n{title} {codes}".
                "item": "{codes}",
                # {title} is cut to this many of the LLM's tokens.
                "max_title_tokens": 32,
            },
            "backbone": {
                # A pretrained decoder: a Hugging Face folder, a hub id or a GGUF file. "" trains one from scratch, with
                # the shape below.
                "checkpoint": "",
                # A checkpoint's first layers alone, which cost less; 0 takes all (docs/llm_memory.md).
                "first_layers": 0,
                # Initial embeddings of a checkpoint's new semantic-ID tokens: "mean" (around the mean of its
                # embeddings), "words" (from the words of the items that carry each code) or "reading" (so that an
                # item's codes come nearest to the LLM's reading of its text).
                "token_init": "mean",
                "width": 128,
                "layers": 2,
                "heads": 4,
                "kv_heads": 4,
                "head_width": 32,
                "mlp_width": 512,
                "rope_theta": 10_000.0,
                "norm_epsilon": 1e-6,
                "dropout": 0.3,
                # The computation's type: "float32", "bfloat16", or "auto", which is bfloat16 on accelerators and on
                # CPUs with bfloat16 units, otherwise float32. Parameters, norms, logits and losses are float32.
                "dtype": "float32",
                # What a layer's backward pass recomputes to save memory: "none", "dots" (all but the large matrix
                # products) or "full".
                "remat": "none",
                # "auto", "xla", "cudnn" (NVIDIA GPUs, bfloat16) or "splash" (TPUs).
                "attention": "auto",
            },
            # Low-rank adapters: above rank 0 a checkpoint's own weights are frozen.
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "dropout": 0.0,
                # The frozen weights' type; "bfloat16" halves their memory.
                "base_dtype": "bfloat16",
            },
            # For all parameters; with a checkpoint, for those that are not the backbone's.
            "optimizer": {
                "learning_rate": 2e-3,
                "warmup_fraction": 0.05,
                # The cosine ends at this share of the peak.
                "final_fraction": 0.0,
                # From this epoch on, warm-up and cosine begin again, for a run that is trained longer than was planned;
                # 0 has one cosine over all epochs.
                "restart_epoch": 0,
                "beta1": 0.9,
                "beta2": 0.98,
                "weight_decay": 0.01,
                # Global norm of the gradients; 0 does not clip.
                "clip_norm": 1.0,
                "accumulate_steps": 1,
                # The same of a checkpoint's backbone: of LoRA's adapters, or of all its weights. What is not here, both
                # groups share.
                "backbone": {"learning_rate": 2e-4, "warmup_fraction": 0.05, "weight_decay": 0.01, "clip_norm": 1.0},
                # And of an item reader that is trained.
                "item_reader": {"learning_rate": 3e-4, "warmup_fraction": 0.05, "weight_decay": 0.01, "clip_norm": 1.0},
            },
            # The number of devices that split a batch ("data"), the parameters and the catalog ("fsdp"), and heads and
            # inner widths ("tensor"); -1 takes all that are left (docs/scale.md).
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "training": {
                "epochs": 30,
                # What begins with an LLM's weights, the backbone or an item reader that is trained, is frozen for this
                # many epochs, like 0.5. Then its learning rate begins with a warm-up of its own.
                "freeze_epochs": 0.0,
                # A batch is [batch_rows, row_length] positions of the backbone (items or tokens), packed with
                # sequences. 0 chooses 16, or 8 or 4 if an epoch would have fewer than 100 updates.
                "batch_rows": 16,
                # 0 chooses: 64, or the longest training prompt if that is longer.
                "row_length": 0,
                # A batch has this many parts, each shuffled and packed on its own by the process that reads it; 0 is
                # one per process. A common multiple of several process counts lets a run continue with any of them.
                "input_streams": 0,
                # Decay of the parameters' moving average, which is then evaluated in their place; 0 keeps none.
                "ema_decay": 0.0,
                "log_every_steps": 50,
                "evaluate_every_epochs": 1,
                # Every evaluation saves a checkpoint. Above 0, one is also saved every this many steps.
                "checkpoint_every_steps": 0,
                # Training stops after this many evaluations without a better validation NDCG@10.
                "patience": 5,
                # A step whose loss or gradient is not finite is skipped. Training stops after this many in a row.
                "max_bad_steps": 10,
            },
            "evaluation": {
                "batch_size": 512,
                # Reports give HR@K and NDCG@K for each K. 10 must be among them, because validation NDCG@10 selects the
                # checkpoint.
                "ks": (1, 5, 10),
            },
        }
    )
