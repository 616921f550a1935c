"""Choose among saved responses; no model, no framework."""

from ec_agents import response_candidates, select
from ec_agents.testing import profile_logprobs

saved = {
    "choices": [
        {"message": {"content": "blue"}, "finish_reason": "stop", "logprobs": profile_logprobs(".......!..")},
        {"message": {"content": "green"}, "finish_reason": "stop", "logprobs": profile_logprobs(".!........")},
        {"message": {"content": "r"}, "finish_reason": "length", "logprobs": profile_logprobs("!")},
    ]
}
candidates = response_candidates(saved)
choice = select(candidates)
for index in choice.order:
    print(candidates[index].content, choice.scores[index], dict(choice.flaws.get(index, {})))
print("chosen:", candidates[choice.chosen].content, choice.reason)
