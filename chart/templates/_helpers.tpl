{{/* Names, labels, and what Pods and Job have in common. What values may say together is in _checks.tpl. */}}

{{- define "llm.selector" -}}
app.kubernetes.io/name: triton-trtllm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "llm.labels" -}}
{{ include "llm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "llm.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "llm.serviceAccount" -}}
{{ .Values.serviceAccount.name | default .Release.Name }}
{{- end }}

{{/* "true" for the engines that run on GPUs; an empty text, which is false, for the others. */}}
{{- define "llm.onGpus" -}}
{{ has .Values.engine.kind (list "tensorrt" "pytorch") | ternary "true" "" }}
{{- end }}

{{- define "llm.builds" -}}
{{ ne .Values.engine.source "image" | ternary "true" "" }}
{{- end }}

{{/*
Drain. How a Pod ends, in seconds; everything follows from drainSeconds and the age of gRPC connections.

  preStop   5 until no proxy sends new connections here, and then the age of the youngest connection (gRPC adds up to a
            tenth), so that clients have gone elsewhere before the server refuses anybody
  drain     SIGTERM; `serve.py --exit-timeout`: requests in flight finish
  end       `serve.py` gives tritonserver 15 to end with nothing in flight, then its models 2.5
  grace     the sum; later the kubelet kills
*/}}
{{- define "llm.drain" -}}
{{- $preStop := add 5 (ceil (mulf 1.1 .Values.grpcConnectionAgeSeconds)) }}
preStop: {{ $preStop }}
drain: {{ .Values.drainSeconds }}
grace: {{ add $preStop .Values.drainSeconds 20 }}
{{- end }}

{{- define "llm.resources" -}}
{{- $gpus := 0 }}
{{- if include "llm.onGpus" .root }}
{{- $gpus = mul .root.Values.engine.tensorParallel .root.Values.engine.pipelineParallel }}
{{- end }}
{{- range list "requests" "limits" }}
{{ . }}:
  cpu: {{ $.resources.cpu | quote }}
  memory: {{ $.resources.memory }}
  {{- if $gpus }}
  nvidia.com/gpu: {{ $gpus }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Where Pods with this engine may run. */}}
{{- define "llm.placement" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $affinity := deepCopy .Values.affinity }}
{{- with .Values.gpuProducts }}
{{- $terms := list (dict "matchExpressions" (list (dict "key" "nvidia.com/gpu.product" "operator" "In" "values" .))) }}
{{- $required := dict "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms)) }}
{{- $affinity = merge $required $affinity }}
{{- end }}
{{- with $affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* The init containers that put an engine into the store and a repository into /models; also the prebuild Job's. */}}
{{- define "llm.builders" -}}
{{- $image := empty .Values.builderImage.repository | ternary .Values.image .Values.builderImage }}
{{- if eq .Values.engine.source "node" }}
- name: own-store # kubelet makes a hostPath folder for root
  image: {{ include "llm.image" (dict "image" $image "root" .) }}
  imagePullPolicy: {{ $image.pullPolicy }}
  command: [chown, "{{ .Values.podSecurityContext.runAsUser }}:{{ .Values.podSecurityContext.runAsGroup }}", /var/lib/triton-trtllm]
  securityContext:
    runAsNonRoot: false
    runAsUser: 0
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [CHOWN]}
  resources: # as much as any other container of the Pod has, which costs nothing: they take turns
    requests: {cpu: {{ .Values.resources.cpu | quote }}, memory: 64Mi}
    limits: {cpu: {{ .Values.resources.cpu | quote }}, memory: 64Mi}
  volumeMounts:
    - {name: store, mountPath: /var/lib/triton-trtllm}
{{- end }}
- name: build
  image: {{ include "llm.image" (dict "image" $image "root" .) }}
  imagePullPolicy: {{ $image.pullPolicy }}
  command: [python3, /opt/triton-trtllm/build/engines.py]
  args:
    - --model={{ .Values.model.checkpoint }}
    - --served-name={{ .Values.model.name }}
    - --engine={{ .Values.engine.kind }}
    {{- with .Values.engine }}
    {{- if has .kind (list "tensorrt" "pytorch") }}
    - --tp={{ .tensorParallel }}
    - --pp={{ .pipelineParallel }}
    {{- end }}
    {{- range $option, $value := dict "dtype" .dtype "quantization" .quantization "kv-cache-dtype" .kvCacheDtype "max-batch-size" .maxBatchSize "max-input-len" .maxInputLen "max-seq-len" .maxSeqLen }}
    {{- with $value }}
    - --{{ $option }}={{ . }}
    {{- end }}
    {{- end }}
    {{- if .claim.readOnly }}
    - --offline
    {{- end }}
    {{- end }}
    {{- if .Values.model.trustRemoteCode }}
    - --trust-remote-code
    {{- end }}
    {{- if .Values.model.tokenSecret.name }}
    - --token-file=/run/secrets/hugging-face/token
    {{- end }}
    - --cache-dir=/var/lib/triton-trtllm/store
    - --output=/models/{{ .Values.model.name }}
    - --symlink-engine # the store is another volume, where hard links do not reach, and engines are too large to copy
    {{- range .Values.engine.buildArguments }}
    - {{ . | quote }}
    {{- end }}
  env:
    - {name: HOME, value: /tmp}
    - {name: HF_HOME, value: /var/lib/triton-trtllm/hugging-face}
    - {name: TERMINATION_MESSAGE_PATH, value: /dev/termination-log}
    {{- with .Values.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  securityContext: {{- toYaml .Values.containerSecurityContext | nindent 4 }}
  resources: {{- include "llm.resources" (dict "root" . "resources" (.Values.builderResources | default .Values.resources)) | trim | nindent 4 }}
  volumeMounts:
    - {name: store, mountPath: /var/lib/triton-trtllm, readOnly: {{ .Values.engine.claim.readOnly }}}
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    {{- if .Values.model.tokenSecret.name }}
    - {name: token, mountPath: /run/secrets/hugging-face, readOnly: true}
    {{- end }}
{{- end }}

{{- define "llm.volumes" -}}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
{{- if include "llm.builds" . }}
- name: models
  emptyDir: {}
- name: store
  {{- if eq .Values.engine.source "node" }}
  hostPath: {path: {{ .Values.engine.node.path }}, type: DirectoryOrCreate}
  {{- else }}
  persistentVolumeClaim: {claimName: {{ .Values.engine.claim.name }}, readOnly: {{ .Values.engine.claim.readOnly }}}
  {{- end }}
{{- with .Values.model.tokenSecret }}
{{- if .name }}
- name: token
  secret: {secretName: {{ .name }}, items: [{key: {{ .key }}, path: token}], defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Autoscaling. The records of monitoring/rules.yaml, by the name that a signal has in the values.
*/}}
{{- define "llm.signals" -}}
concurrency: "triton:requests:current"
queueComputeRatio: "triton:queue_compute:ratio"
kvCache: "triton:kv_cache:fraction"
{{- end }}

{{/*
What KEDA asks, of a record over the Pods of this release: the sum, which an AverageValue divides by its target. A Pod
that still starts adds nothing, so it is credited, and Pods are not asked for twice.

  1  what each Pod has (max: two PodMonitors may scrape the same Pod)
  2  a Pod without a value, for a minute: the last it had, at most the target. A Pod that has just ended is gone before
     the minute is over, and must not count as full
  3  then, while Prometheus still looks for it: the target, as the HorizontalPodAutoscaler counts a Pod without a value.
     So what cannot be seen never makes the pool smaller; after an hour it is given up
  4  NaN is no answer (`>= 0` drops it), and no answer is an error to KEDA, which changes nothing
  5  nor is there one before Prometheus has known the release for a minute: one that comes back without its data sees
     some of the Pods first
*/}}
{{- define "llm.query" -}}
{{- $own := printf "{namespace=%q, app_kubernetes_io_instance=%q}" .root.Release.Namespace .root.Release.Name -}}
{{- $record := print .record $own -}}
sum(
  max by (namespace, pod) ({{ $record }})
  or
  (
    clamp_max(max by (namespace, pod) (last_over_time({{ $record }}[1m])), {{ .target }})
    or
    {{ .target }} * max by (namespace, pod) (present_over_time({{ $record }}[1h]))
  )
  and on (namespace, pod) up{{ $own }}
) >= 0
and group(present_over_time({{ $record }}[1h] offset 1m))
{{- end }}

{{/*
How the pool changes, from how long a Pod takes to be ready.

  up    at once; in the time of one start the pool at most doubles, or grows by four. Its Pods are credited meanwhile
  down  to the most that was wanted within the time in which a Pod would be back: a start, and 60 for scrape, rules and
        sync (45, rounded up). A Pod that is kept so long costs at most what its next start costs. Then straight there;
        without `concurrency` by one Pod per window, since the other signals do not say how many Pods are needed: below
        capacity the ratio is 0, which asks for none
*/}}
{{- define "llm.behavior" -}}
{{- if .behavior -}}
{{ toYaml .behavior }}
{{- else -}}
{{- $start := int .podStartSeconds -}}
{{- $up := min (max 15 $start) 1800 -}}
{{- $down := min (add $start 60) 3600 -}}
scaleUp:
  stabilizationWindowSeconds: 0
  selectPolicy: Max
  policies:
    - {type: Pods, value: 4, periodSeconds: {{ $up }}}
    - {type: Percent, value: 100, periodSeconds: {{ $up }}}
scaleDown:
  stabilizationWindowSeconds: {{ $down }}
  selectPolicy: Max
  policies:
    {{- if .signals.concurrency }}
    - {type: Percent, value: 100, periodSeconds: 15}
    {{- else }}
    - {type: Pods, value: 1, periodSeconds: {{ min $down 1800 }}}
    {{- end }}
{{- end }}
{{- end }}
