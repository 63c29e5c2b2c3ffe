{{/* Validation that a JSON schema cannot express: values that contradict each other. All problems are reported. */}}
{{- define "vqa-worker.check" -}}
{{- $faults := concat
      (include "vqa-worker.faultsOfSettings" . | splitList "\n")
      (include "vqa-worker.faultsOfSecrets" . | splitList "\n")
      (include "vqa-worker.faultsOfScaling" . | splitList "\n") }}
{{- with without $faults "" }}
{{- fail (printf "Invalid combination of values:\n- %s\n" (join "\n- " .)) }}
{{- end }}
{{- end }}

{{- define "vqa-worker.faultsOfSettings" -}}
{{- $settings := .Values.settings }}
{{- if not $settings.allowedBuckets }}
settings.allowedBuckets is empty: list the buckets that jobs may read from, or ["*"] for any.
{{- end }}
{{- if le (float64 $settings.shutdownGrace) (float64 $settings.modelTimeout) }}
settings.shutdownGrace ({{ $settings.shutdownGrace }} s) must be more than settings.modelTimeout ({{ $settings.modelTimeout }} s): otherwise a shutdown aborts model requests that are billed.
{{- end }}
{{- end }}

{{- define "vqa-worker.faultsOfSecrets" -}}
{{- $secrets := .Values.secrets }}
{{- $tls := .Values.rabbitmqTls }}
{{- $given := include "vqa-worker.secrets" . }}
{{- if $secrets.existingSecret }}
{{- if $given }}
secrets.existingSecret and other values of secrets are mutually exclusive: put everything into the Secret, or leave secrets.existingSecret empty.
{{- end }}
{{- else if not (or .Values.settings.secretsDir .Values.extraEnvFrom) }}
{{- $elsewhere := list }}
{{- range .Values.extraEnv }}
{{- $elsewhere = append $elsewhere .name }}
{{- end }}
{{- if not (or $secrets.rabbitmqUrl (has "VQA_RABBITMQ_URL" $elsewhere)) }}
secrets.rabbitmqUrl is empty: set amqp://user:password@host:5672/vhost, or name a Secret with the key VQA_RABBITMQ_URL in secrets.existingSecret.
{{- end }}
{{- if not (or $secrets.modelApiKey $secrets.deepinfraToken $secrets.openaiApiKey (has "VQA_MODEL_API_KEY" $elsewhere) (has "DEEPINFRA_TOKEN" $elsewhere) (has "OPENAI_API_KEY" $elsewhere)) }}
secrets.modelApiKey is empty: set the API key (any value if the server requires none), or name a Secret with the key VQA_MODEL_API_KEY in secrets.existingSecret.
{{- end }}
{{- end }}
{{- if and $secrets.asFiles .Values.settings.secretsDir }}
secrets.asFiles and settings.secretsDir are mutually exclusive: the first mounts the Secret and sets the second.
{{- end }}
{{- if and $secrets.asFiles (not (include "vqa-worker.secretName" .)) }}
secrets.asFiles is set, but there is no Secret to mount: set secrets.rabbitmqUrl and secrets.modelApiKey, or secrets.existingSecret.
{{- end }}
{{- range $name, $url := dict "secrets.rabbitmqUrl" $secrets.rabbitmqUrl "topology.hook.rabbitmqUrl" .Values.topology.hook.rabbitmqUrl }}
{{- if and $url (not (regexMatch "^amqps?://" $url)) }}
{{ $name }} must begin with amqp:// or amqps://.
{{- else if and $tls.existingSecret (hasPrefix "amqp://" $url) }}
rabbitmqTls.existingSecret has no effect without TLS: {{ $name }} must begin with amqps://.
{{- end }}
{{- end }}
{{- if ne (empty $tls.certKey) (empty $tls.keyKey) }}
rabbitmqTls.certKey and rabbitmqTls.keyKey belong together: set both or neither.
{{- end }}
{{- $hook := .Values.topology.hook }}
{{- if and $hook.enabled (not (or $hook.rabbitmqUrl $hook.existingSecret $secrets.rabbitmqUrl $secrets.existingSecret)) }}
topology.hook has no RabbitMQ URL: set topology.hook.rabbitmqUrl or topology.hook.existingSecret, or set topology.hook.enabled to false.
{{- end }}
{{- if and $hook.rabbitmqUrl $hook.existingSecret }}
topology.hook.rabbitmqUrl and topology.hook.existingSecret are mutually exclusive: leave one empty.
{{- end }}
{{- end }}

{{- define "vqa-worker.faultsOfScaling" -}}
{{- $scaling := .Values.autoscaling }}
{{- if ne $scaling.mode "none" }}
{{- $most := include "vqa-worker.maxReplicas" . | int }}
{{- if not $most }}
autoscaling.maxReplicas is required if provider.maxConcurrentRequests sets no limit.
{{- else if gt (int $scaling.minReplicas) $most }}
autoscaling.minReplicas ({{ $scaling.minReplicas }}) is more than the maximum number of replicas ({{ $most }}), from autoscaling.maxReplicas or provider.maxConcurrentRequests / settings.maxConcurrency.
{{- end }}
{{- end }}
{{- if eq $scaling.mode "keda" }}
{{- $keda := $scaling.keda }}
{{- if not $keda.host }}
autoscaling.keda.host is empty: KEDA requires the URL of RabbitMQ's management API, e.g. http://rabbitmq.rabbitmq:15672/.
{{- end }}
{{- if contains "@" $keda.host }}
autoscaling.keda.host must not contain user and password: set autoscaling.keda.username and autoscaling.keda.password, not encoded.
{{- end }}
{{- if and $keda.existingSecret (or $keda.username $keda.password) }}
autoscaling.keda.existingSecret and autoscaling.keda.username, autoscaling.keda.password are mutually exclusive: leave the one or the others empty.
{{- else if not (or $keda.existingSecret (and $keda.username $keda.password)) }}
autoscaling.keda.username and autoscaling.keda.password are required, or a Secret with the keys username and password in autoscaling.keda.existingSecret.
{{- end }}
{{- if ne (empty $keda.tls.certKey) (empty $keda.tls.keyKey) }}
autoscaling.keda.tls.certKey and autoscaling.keda.tls.keyKey belong together: set both or neither.
{{- end }}
{{- if and $keda.tls.existingSecret (hasPrefix "http://" $keda.host) }}
autoscaling.keda.tls.existingSecret has no effect without TLS: autoscaling.keda.host must begin with https://.
{{- end }}
{{- end }}
{{- end }}
