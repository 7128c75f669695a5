"""Every option, with its default. The files in `configs/` begin here and change what they are about."""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """All keys that exist: a config or an override can't add others."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            # Where prepared data and semantic IDs are kept; "" is WORKDIR/cache. Runs that share a folder share the
            # work.
            "cache_dir": "",
            "data": {
                # "p5", "lcrec", "minionerec", "recbole", "log", "amazon_reviews" or "synthetic" (docs/data.md).
                "format": "p5",
                "path": "",
                # What reports call the dataset; "" takes the folder's name.
                "name": "",
                # Users and items with fewer interactions are removed, again and again until none is left; 0 keeps all.
                "k_core": 0,
                # "leave_one_out", "temporal" (shares of the interactions, by time) or "given" (as the files have it).
                "split": "leave_one_out",
                "validation_fraction": 0.1,
                "test_fraction": 0.1,
                # The newest items of a history that the model sees; longer training sequences are cut into such
                # windows.
                "max_items": 20,
                # format "log": the columns of a CSV or Parquet file, and a file of item texts if there is one.
                "log": {
                    "user": "user",
                    "item": "item",
                    "timestamp": "timestamp",
                    "items_file": "",
                    "items_id": "item",
                    "items_text": ("title",),
                },
                # format "amazon_reviews": version "2014", "2018" or "2023", category as in the file names.
                "amazon_reviews": {"version": "2023", "category": "All_Beauty"},
                # format "synthetic": what is generated.
                "synthetic": {"num_users": 6000, "num_items": 1200, "seed": 0},
            },
            "semantic_ids": {
                # "fit" learns them from embeddings; "given" takes the dataset's own (`*.index.json`).
                "source": "fit",
                "embeddings": {
                    # Any of "tfidf", "text_encoder", "npy", "interactions" (training interactions only), concatenated.
                    "names": ("tfidf",),
                    # One factor for each name; () is all one.
                    "weights": (),
                    "dim": 256,
                    # A sentence-transformers or Hugging Face encoder: a folder or a hub id (pip install
                    # simgr_jax[text]).
                    "encoder": "",
                    "npy_path": "",
                    # How many items apart two items of a sequence still count as neighbours.
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
            "model": {
                # "simgr", whose are the keys below, or a rival: see `models.create.MODELS`. A rival's own keys are in
                # the group of its name.
                "name": "simgr",
                # "item": one position an item, its vector; "tokens": `prompt`, a position a token, as an LLM reads.
                "history": "item",
                # "last", "mean" or "attention".
                "user_pooling": "last",
                # "mean" (the paper's), "gated", "attention", "cross_attention", "mlp" or "mean_mlp".
                "item_encoder": "mean_mlp",
                "item_encoder_width": 256,
                # "cosine" or "dot".
                "similarity": "cosine",
                "temperature": 0.07,
                "learn_temperature": False,
                "temperature_min": 0.01,
                "temperature_max": 1.0,
            },
            # Of history "tokens".
            "prompt": {
                # Text before the first item.
                "prefix": "",
                # Of each item. {codes} ends it: the user's state is read there. Before it, an LLM can read text and
                # the item's {title}: "\n{title} {codes}".
                "item": "{codes}",
                # Of the item's text, {title} is so many of the LLM's tokens.
                "max_title_tokens": 32,
            },
            "backbone": {
                # A Hugging Face decoder: a folder, or a hub id. "" trains one from scratch, of the shape below.
                "checkpoint": "",
                # Where a checkpoint's new semantic-ID tokens begin: "mean" (around the mean of its embeddings) or
                # "words" (the embeddings of the words of the items that carry each code).
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
                # Of the computation; "bfloat16" on accelerators. Parameters, norms, logits and losses are float32.
                "dtype": "float32",
                # What a layer's backward pass computes again to save memory: "none", "dots" (all but the large
                # matrix products) or "full".
                "remat": "none",
                # "auto", "xla", "cudnn" (NVIDIA GPUs, bfloat16) or "splash" (TPUs).
                "attention": "auto",
            },
            # Low-rank adapters: above rank 0 a checkpoint's own weights stay as they are.
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "dropout": 0.0,
                # Of the weights that stay; "bfloat16" halves their memory.
                "base_dtype": "bfloat16",
            },
            "loss": {
                "full_catalog_weight": 1.0,
                # Against items drawn at random for each batch, for catalogs too large to go through
                # (docs/large_catalogs.md).
                "sampled_weight": 0.0,
                "sampled_negatives": 4096,
                # "uniform" or "popularity".
                "sampled_from": "uniform",
                "in_batch_weight": 0.0,
                "log_q": True,
                "label_smoothing": 0.0,
                # Items (of each device's) that the full-catalog loss encodes and scores at once, so that memory does
                # not grow with the catalog; 0 takes all at once, -1 what the device's memory has room for.
                "catalog_chunk": -1,
            },
            # Of model "autoregressive" alone.
            "autoregressive": {
                # Beginnings of items that beam search keeps; at least the length of the lists.
                "beam_width": 20,
            },
            # Of model "encoder_decoder" alone (TIGER); the encoder has the backbone's layers.
            "encoder_decoder": {
                # "bidirectional" (TIGER's), which reads a history anew for each of its targets, or "causal", which
                # reads it once for all of them.
                "encoder": "bidirectional",
                "decoder_layers": 2,
                # As the autoregressive model's.
                "beam_width": 20,
            },
            # Of model "parallel" alone; the search as RPG's repository has it for Beauty.
            "parallel": {
                # Of each level's softmax over cosines. RPG's default; its figures for Amazon are at 0.03.
                "temperature": 0.07,
                # "exhaustive" scores every item; "graph" walks from random items to ever better ones, along a graph of
                # similar items.
                "decoding": "exhaustive",
                # Most similar items that each item leads to.
                "graph_neighbors": 200,
                # Items that are kept after each step.
                "beam_width": 20,
                "steps": 3,
            },
            "item_knn": {
                # The most alike items of each that count.
                "neighbors": 20,
                # Users more, as it were, that a pair of items does not share: against chance where few tell.
                "shrinkage": 30.0,
            },
            "sasrec": {
                # "full" (over the catalog) or "binary" (the paper's: against one other item).
                "loss": "full",
            },
            "bert4rec": {
                # Of the items of a training sequence, those that are hidden; at least one is.
                "mask_fraction": 0.2,
                # Of the training sequences, those of which the last item alone is hidden.
                "last_fraction": 0.5,
            },
            "optimizer": {
                "learning_rate": 2e-3,
                "warmup_fraction": 0.05,
                # The cosine ends at this share of the peak.
                "final_fraction": 0.0,
                "beta1": 0.9,
                "beta2": 0.98,
                "weight_decay": 0.01,
                # Global norm of the gradients; 0 does not clip.
                "clip_norm": 1.0,
                "accumulate_steps": 1,
            },
            # How many devices a batch ("data"), the parameters and the catalog ("fsdp"), and heads and inner widths
            # ("tensor") are split over; -1 takes what is left (docs/scale.md).
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "training": {
                "epochs": 30,
                # A batch is [batch_rows, row_length] positions of the backbone (an item each, or a token), packed with
                # sequences.
                "batch_rows": 16,
                "row_length": 64,
                # Parts of a batch that are shuffled and packed each on its own, by the process that reads it; 0 is one
                # for each process. With a multiple of all their numbers, a run can go on with more or fewer processes.
                "input_streams": 0,
                # Decay of the parameters' moving average, which is then what is evaluated; 0 keeps none.
                "ema_decay": 0.0,
                "log_every_steps": 50,
                "evaluate_every_epochs": 1,
                # A checkpoint is taken at each evaluation, and between them every so many steps; 0 takes none between.
                "checkpoint_every_steps": 0,
                # Evaluations without a better validation NDCG@10 before training stops.
                "patience": 5,
            },
            "evaluation": {
                "batch_size": 512,
                # Leave the items of a user's history out of their list (published figures do not).
                "filter_history": False,
            },
        }
    )
