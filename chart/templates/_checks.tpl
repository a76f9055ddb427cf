{{/* What values say together, which values.schema.json cannot see. Each refusal is a sentence. */}}
{{- define "llm.checks" -}}
{{- $engine := .Values.engine }}
{{- $onGpus := include "llm.onGpus" . }}
{{- $gpus := mul $engine.tensorParallel $engine.pipelineParallel }}
{{- $needed := empty $onGpus | ternary 0 $gpus }}
{{- if gt (int $engine.nodes) 1 }}
{{- fail (printf "engine.nodes is %v, and this version runs an engine on one node only; leave it 1 and choose tensorParallel x pipelineParallel that one node has GPUs for" $engine.nodes) }}
{{- end }}
{{- if and (not $onGpus) (ne $gpus 1) }}
{{- fail (printf "tensorParallel x pipelineParallel is %d, and an %s engine has no GPUs; leave both 1" $gpus $engine.kind) }}
{{- end }}
{{- if not (kindIs "invalid" .Values.gpus) }}
{{- if ne (int .Values.gpus) (int $needed) }}
{{- fail (printf "gpus is %v, and this engine needs %d (tensorParallel %v x pipelineParallel %v, engine.kind %s); leave gpus out, or change them" .Values.gpus $needed $engine.tensorParallel $engine.pipelineParallel $engine.kind) }}
{{- end }}
{{- end }}
{{- if and $onGpus (not .Values.gpuProducts) }}
{{- fail (printf "gpuProducts is empty, and a %s engine runs on the GPU product it is built for; name products as in the node label nvidia.com/gpu.product, such as [NVIDIA-H100-80GB-HBM3]" $engine.kind) }}
{{- end }}
{{- if and (not $onGpus) .Values.gpuProducts }}
{{- fail (printf "gpuProducts is %s, and an %s engine uses no GPU; leave it empty" (.Values.gpuProducts | join ", ") $engine.kind) }}
{{- end }}
{{- if and $engine.maxInputLen $engine.maxSeqLen (ge (int $engine.maxInputLen) (int $engine.maxSeqLen)) }}
{{- fail (printf "engine.maxInputLen is %v and maxSeqLen, prompt and answer together, is %v; make maxSeqLen larger" $engine.maxInputLen $engine.maxSeqLen) }}
{{- end }}
{{- if include "llm.builds" . }}
{{- if not .Values.model.checkpoint }}
{{- fail (printf "model.checkpoint is empty, and engine.source %s builds the engine; give a Hugging Face id or a folder of the builder's image, or bake an engine into the image (engine.source image)" $engine.source) }}
{{- end }}
{{- if and (not $onGpus) (not .Values.builderImage.repository) }}
{{- fail (printf "builderImage.repository is empty, and the server's image cannot compile an %s engine; set it to triton-trtllm/builder" $engine.kind) }}
{{- end }}
{{- else }}
{{- if or .Values.model.checkpoint .Values.model.tokenSecret.name $engine.prebuild.enabled $engine.buildArguments }}
{{- fail "engine.source is image, whose engine is baked in, so nothing is built; leave out model.checkpoint, model.tokenSecret, engine.prebuild and engine.buildArguments, or choose engine.source node or claim" }}
{{- end }}
{{- end }}
{{- if and (eq $engine.source "claim") (not $engine.claim.name) }}
{{- fail "engine.claim.name is empty; make a PersistentVolumeClaim for the engine store and name it there" }}
{{- end }}
{{- if and (ne $engine.source "claim") (or $engine.claim.name $engine.claim.readOnly) }}
{{- fail (printf "engine.claim is set, and engine.source is %s; leave it out, or choose engine.source claim" $engine.source) }}
{{- end }}
{{- if and $engine.claim.readOnly $engine.prebuild.enabled }}
{{- fail "engine.claim.readOnly and engine.prebuild.enabled contradict each other: nothing can be built into a read-only store; leave one out" }}
{{- end }}
{{- $unit := dict "Mi" 1 "Gi" 1024 "Ti" 1048576 }}
{{- $shm := mul (regexFind "^[0-9]+" .Values.sharedMemory | int64) (get $unit (regexFind "[A-Z]i$" .Values.sharedMemory)) }}
{{- $memory := mul (regexFind "^[0-9]+" .Values.resources.memory | int64) (get $unit (regexFind "[A-Z]i$" .Values.resources.memory)) }}
{{- if ge $shm $memory }}
{{- fail (printf "sharedMemory is %s and counts as memory of the Pod, of which resources.memory allows %s; make sharedMemory smaller" .Values.sharedMemory .Values.resources.memory) }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %v and maxReplicas is %v; make maxReplicas at least as large" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) }}
{{- end }}
{{- if and (ne .Values.autoscaling.mode "none") (not .Values.monitoring.enabled) }}
{{- fail (printf "autoscaling.mode is %s, which scales on a Prometheus metric, and monitoring.enabled is false; set it to true" .Values.autoscaling.mode) }}
{{- end }}
{{- $signals := .Values.autoscaling.signals }}
{{- if ne .Values.autoscaling.mode "none" }}
{{- if not (or $signals.concurrency $signals.queueComputeRatio $signals.kvCache) }}
{{- fail (printf "autoscaling.mode is %s and none of autoscaling.signals has a target; set concurrency, a little below engine.maxBatchSize" .Values.autoscaling.mode) }}
{{- end }}
{{- if and $engine.maxBatchSize $signals.concurrency (gt (float64 $signals.concurrency) (float64 $engine.maxBatchSize)) }}
{{- fail (printf "autoscaling.signals.concurrency is %v and engine.maxBatchSize is %v, so every Pod would have a queue before another is added; make concurrency a little smaller than engine.maxBatchSize" $signals.concurrency $engine.maxBatchSize) }}
{{- end }}
{{- if and (not .Values.autoscaling.behavior) $signals.kvCache (gt (float64 $signals.kvCache) 0.9) }}
{{- fail (printf "autoscaling.signals.kvCache is %v, and Kubernetes lets a tenth above a target pass, which is more than a full cache; make it 0.9 or less" $signals.kvCache) }}
{{- end }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
{{- fail "ingress.enabled is true and ingress.host is empty; give the host name" }}
{{- end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.name) }}
{{- fail "gateway.enabled is true and gateway.name is empty; name the Gateway that the routes are for" }}
{{- end }}
{{- end }}
