-- A 2 KB chat request with `model` last.
local text = string.rep("The quick brown fox jumps over the lazy dog. ", 43)
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.body = '{"messages":[{"role":"user","content":"' .. text .. '"}],"max_tokens":64,"model":"m"}'
wrk.headers["Content-Type"] = "application/json"
if os.getenv("BENCH_KEY") then
  wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"us":%d,"p50_us":%d,"p99_us":%d,"errors":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
