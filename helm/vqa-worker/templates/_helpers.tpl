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

{{- define "vqa-worker.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "vqa-worker.instanceLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "vqa-worker.instanceLabels" -}}
app.kubernetes.io/name: {{ include "vqa-worker.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What tells the workers' pods from all others, those of the hook too. Deployments cannot change it later. */}}
{{- define "vqa-worker.selectorLabels" -}}
{{ include "vqa-worker.instanceLabels" . }}
app.kubernetes.io/component: worker
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
