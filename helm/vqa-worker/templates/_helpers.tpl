{{/* Names ------------------------------------------------------------------------------------------------------ */}}

{{- define "vqa-worker.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The names of all objects begin with it; 40 characters leave room for what follows. */}}
{{- define "vqa-worker.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels ----------------------------------------------------------------------------------------------------- */}}

{{/* An object's labels: (list <root> <its own labels>). */}}
{{- define "vqa-worker.labels" -}}
{{- $root := index . 0 }}
{{- $chart := printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- $standard := dict "helm.sh/chart" $chart "app.kubernetes.io/managed-by" $root.Release.Service }}
{{- toYaml (merge $standard (include "vqa-worker.podLabels" . | fromYaml)) }}
{{- end }}

{{/* A pod's labels, likewise. The chart's version is left out, so that a new chart does not mean new pods. */}}
{{- define "vqa-worker.podLabels" -}}
{{- $root := index . 0 }}
{{- $standard := dict "app.kubernetes.io/version" $root.Chart.AppVersion }}
{{- $instance := include "vqa-worker.instanceLabels" $root | fromYaml }}
{{- toYaml (merge $instance $standard (index . 1) $root.Values.commonLabels) }}
{{- end }}

{{- define "vqa-worker.instanceLabels" -}}
app.kubernetes.io/name: {{ include "vqa-worker.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* What distinguishes the pods of workers from all others, those of the hook too. Deployments cannot change it later. */}}
{{- define "vqa-worker.workerLabels" -}}
{{ include "vqa-worker.instanceLabels" . }}
app.kubernetes.io/component: "worker"
{{- end }}

{{/* How many pods ---------------------------------------------------------------------------------------------- */}}

{{/* How many pods the API has requests for; empty if it has no limit. One may always run: it limits itself. */}}
{{- define "vqa-worker.podsOfProvider" -}}
{{- with .Values.provider.maxConcurrentRequests }}
{{- max 1 (div . $.Values.settings.maxConcurrency) }}
{{- end }}
{{- end }}

{{- define "vqa-worker.maxReplicas" -}}
{{- $allowed := include "vqa-worker.podsOfProvider" . | default .Values.autoscaling.maxReplicas | int }}
{{- min $allowed (.Values.autoscaling.maxReplicas | default $allowed) }}
{{- end }}

{{/* Messages for one pod. */}}
{{- define "vqa-worker.targetValue" -}}
{{- .Values.autoscaling.value | default .Values.settings.maxConcurrency | int64 }}
{{- end }}

{{/* The settings ----------------------------------------------------------------------------------------------- */}}

{{/* A value as the worker reads it: lists with commas, numbers in full (and not as 1.6e+07), objects as JSON. */}}
{{- define "vqa-worker.text" -}}
{{- if kindIs "string" . }}{{ . }}
{{- else if kindIs "slice" . }}{{ join "," . }}
{{- else }}{{ toRawJson . }}
{{- end }}
{{- end }}

{{/* One line `VARIABLE: "value"` for each setting; for `null`, "" and {} the worker's default holds. */}}
{{- define "vqa-worker.settings" -}}
{{- $tls := .Values.rabbitmqTls }}
{{- $derived := dict "declareTopology" (not .Values.topology.hook.enabled) }}
{{- if .Values.secrets.asFiles }}
{{- $_ := set $derived "secretsDir" (include "vqa-worker.secretsPath" .) }}
{{- end }}
{{- if $tls.existingSecret }}
{{- range $name, $key := dict "rabbitmqCaFile" $tls.caKey "rabbitmqCertFile" $tls.certKey "rabbitmqKeyFile" $tls.keyKey }}
{{- if $key }}
{{- $_ := set $derived $name (printf "%s/%s" (include "vqa-worker.tlsPath" $) $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $given := .Values.settings }}
{{- if not (or (kindIs "invalid" $given) (has $given (list "" dict))) }}
{{- $_ := set $derived $name $given }}
{{- end }}
{{- end }}
{{- range $name, $value := $derived }}
{{ include "vqa-worker.variable" $name }}: {{ include "vqa-worker.text" $value | quote }}
{{- end }}
{{- end }}

{{/* `s3EndpointUrl` → `VQA_S3_ENDPOINT_URL` */}}
{{- define "vqa-worker.variable" -}}
VQA_{{ regexReplaceAll "([A-Z])" . "_${1}" | upper }}
{{- end }}

{{/* Those that are secret: a line `VARIABLE: value` for each that is given, its value in base64. */}}
{{- define "vqa-worker.secrets" -}}
{{- range $name, $variable := dict
      "rabbitmqUrl" "VQA_RABBITMQ_URL" "modelApiKey" "VQA_MODEL_API_KEY" "modelHeaders" "VQA_MODEL_HEADERS"
      "deepinfraToken" "DEEPINFRA_TOKEN" "openaiApiKey" "OPENAI_API_KEY" }}
{{- with get $.Values.secrets $name }}
{{ $variable }}: {{ include "vqa-worker.text" . | b64enc | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* The Secret with them: the user's or the chart's. Empty: there is none. */}}
{{- define "vqa-worker.secretName" -}}
{{- if .Values.secrets.existingSecret }}{{ .Values.secrets.existingSecret }}
{{- else if include "vqa-worker.secrets" . }}{{ include "vqa-worker.fullname" . }}
{{- end }}
{{- end }}

{{- define "vqa-worker.secretsPath" -}}
/etc/vqa-worker/secrets
{{- end }}

{{- define "vqa-worker.tlsPath" -}}
/etc/vqa-worker/rabbitmq-tls
{{- end }}

{{/* Pods ------------------------------------------------------------------------------------------------------- */}}

{{- define "vqa-worker.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- define "vqa-worker.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "vqa-worker.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{/* Seconds from SIGTERM to SIGKILL: what the jobs get, and what the worker takes afterwards to requeue those that
     were interrupted (10), to end consuming (5), to send its last spans (5) and to close its connections (5). */}}
{{- define "vqa-worker.terminationGracePeriodSeconds" -}}
{{- add (ceil .Values.settings.shutdownGrace) 25 }}
{{- end }}

{{/* What all pods have in common: where they run, and as whom. */}}
{{- define "vqa-worker.podSpec" -}}
# Nothing here talks to the Kubernetes API.
automountServiceAccountToken: false
# A Service named vqa-… would otherwise look like a setting.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "vqa-worker.container" -}}
image: {{ include "vqa-worker.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What the containers of workers and of the check read: their settings, secrets and certificates. */}}
{{- define "vqa-worker.environment" -}}
envFrom:
  - configMapRef:
      name: {{ include "vqa-worker.fullname" . | quote }}
  {{- with include "vqa-worker.secretName" . }}
  {{- if not $.Values.secrets.asFiles }}
  - secretRef:
      name: {{ . | quote }}
  {{- end }}
  {{- end }}
  {{- with .Values.aws.existingSecret }}
  - secretRef:
      name: {{ . | quote }}
  {{- end }}
  {{- with .Values.extraEnvFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if or .Values.aws.region .Values.extraEnv }}
env:
  {{- with .Values.aws.region }}
  - name: AWS_REGION
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "vqa-worker.volumeMounts" -}}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- if .Values.secrets.asFiles }}
  - name: secrets
    mountPath: {{ include "vqa-worker.secretsPath" . }}
    readOnly: true
  {{- end }}
  {{- if .Values.rabbitmqTls.existingSecret }}
  {{- include "vqa-worker.tlsMount" . | nindent 2 }}
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "vqa-worker.volumes" -}}
volumes:
  # The root file system is read-only.
  - name: tmp
    emptyDir:
      sizeLimit: 64Mi
  {{- if .Values.secrets.asFiles }}
  - name: secrets
    secret:
      secretName: {{ include "vqa-worker.secretName" . | quote }}
      defaultMode: 288 # 0440: the group is that of podSecurityContext.fsGroup
  {{- end }}
  {{- with .Values.rabbitmqTls.existingSecret }}
  {{- include "vqa-worker.tlsVolume" . | nindent 2 }}
  {{- end }}
  {{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "vqa-worker.tlsVolume" -}}
- name: rabbitmq-tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 288 # 0440: the group is that of podSecurityContext.fsGroup
{{- end }}

{{- define "vqa-worker.tlsMount" -}}
- name: rabbitmq-tls
  mountPath: {{ include "vqa-worker.tlsPath" . }}
  readOnly: true
{{- end }}

{{/* Networks --------------------------------------------------------------------------------------------------- */}}

{{/* The port that a URL names, else that of its scheme. */}}
{{- define "vqa-worker.port" -}}
{{- $authority := regexFind "^[a-z]+://[^/?]*" . }}
{{- $port := regexFind ":[0-9]+$" $authority | trimPrefix ":" }}
{{- $port | default (get (dict "http" "80" "https" "443" "amqp" "5672" "amqps" "5671") (regexFind "^[a-z]+" .)) }}
{{- end }}

{{/* A rule of egress: (list <to> <ports>). */}}
{{- define "vqa-worker.egress" -}}
- ports:
    {{- range index . 1 }}
    - protocol: TCP
      port: {{ . | int }}
    {{- end }}
  {{- with index . 0 }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "vqa-worker.egressToDns" -}}
- ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
  {{- with .Values.networkPolicy.dnsTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "vqa-worker.egressToRabbitmq" -}}
{{- $ports := .Values.networkPolicy.rabbitmqPorts }}
{{- if not $ports }}
{{- $ports = list 5671 5672 }}
{{- with .Values.secrets.rabbitmqUrl }}
{{- $ports = list }}
{{- range splitList " " (regexReplaceAll "\\s*,\\s*(amqps?://)" . " ${1}") }}
{{- $ports = append $ports (include "vqa-worker.port" .) | uniq }}
{{- end }}
{{- end }}
{{- end }}
{{- include "vqa-worker.egress" (list .Values.networkPolicy.rabbitmqTo $ports) }}
{{- end }}
