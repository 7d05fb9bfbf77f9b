set -u
export PYTHONPATH=$PWD/.bundle QBENCH_COMMIT=$1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
nvidia-smi -L; python3 -c "import torch;print(torch.cuda.get_device_properties(0).uuid)"
timeout 60 python3 -m orchestrator --list > $OUT/list.txt 2>&1; tail -5 $OUT/list.txt
for m in 0.5b 7b; do
  timeout 250 python3 -m orchestrator --all --model random:qwen2.5-$m --budget 100 --out $OUT/r$m > $OUT/table-$m.txt 2> $OUT/err-$m.txt; echo "rc $?"
  cat $OUT/err-$m.txt | tail -20; cat $OUT/table-$m.txt
  timeout 60 python3 -m orchestrator.memory_cli 2>/dev/null
  python3 -c "from orchestrator.memory_cli import main; import sys; sys.argv=['m','$OUT/r$m']; main()" > $OUT/mem-$m.txt 2>&1; head -40 $OUT/mem-$m.txt
done
cd $OUT && for m in 0.5b 7b; do tar czf r$m.tgz r$m && rm -r r$m; done
