"""REINFORCE by hand: a trainer that knows only Gymnasium and transformers."""

import sys

import gymnasium
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

env = gymnasium.make(
    "reopold_agent.envs:reopold/Gymnasium-v0", gym_id="FrozenLake-v1", show="text", max_turns=3
)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
for step in range(int(sys.argv[2])):
    (observation, info), total, losses, over = env.reset(seed=step), 0.0, [], False
    chat = [{"role": "system", "content": info["system_prompt"]}]
    while not over:
        chat.append({"role": "user", "content": observation["text"]})
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, do_sample=True, max_new_tokens=64)
        sampled = torch.arange(whole.shape[1]) >= ids.shape[1]
        losses.append(model(whole, labels=whole.where(sampled, -100)).loss)
        words = tokenizer.decode(whole[0][sampled], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": words})
        observation, reward, terminated, truncated, _ = env.step(words)
        total, over = total + reward, terminated or truncated
    (total * torch.stack(losses).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"episode {step}: {len(losses)} turns, reward {total:g}")
