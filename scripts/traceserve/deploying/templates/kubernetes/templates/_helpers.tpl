{{- define "traceserve.name" -}}
{{- /* A Service's name begins with a letter and has no dots; a release's may be otherwise. */ -}}
{{- regexReplaceAll "^([0-9])" (.Release.Name | replace "." "-") "m-${1}" | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "traceserve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "traceserve.labels" -}}
{{ include "traceserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | trunc 63 | trimAll "-_." | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimAll "-_." | quote }}
{{- end -}}

{{- /* Whether an nginx stands before the server. */ -}}
{{- define "traceserve.proxied" -}}
{{- if and .Values.keys.enabled (eq .Values.engine "torchserve") -}}yes{{- end -}}
{{- end -}}

{{- /* Whether Prometheus' metrics have a port that is known before. */ -}}
{{- define "traceserve.metrics" -}}
{{- if eq .Values.engine "torchserve" -}}yes{{- end -}}
{{- end -}}

{{- define "traceserve.port" -}}
{{- if include "traceserve.proxied" . -}}8081{{- else -}}8080{{- end -}}
{{- end -}}

{{- define "traceserve.secret" -}}
{{- required "keys.existingSecret: the name of a Secret with the entry `key`, or keys.enabled=false where a gateway decides who may ask" .Values.keys.existingSecret -}}
{{- end -}}

{{- define "traceserve.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "traceserve.probe" -}}
exec:
  command: [python, -m, traceserve.deploying.inside.canary, /etc/traceserve/canaries.json, --url, "http://127.0.0.1:{{ include "traceserve.port" . }}", --timeout, "{{ .Values.probes.timeout }}"]
timeoutSeconds: {{ add .Values.probes.timeout (mul 2 (len .Values.archives.files)) }}
{{- end -}}
