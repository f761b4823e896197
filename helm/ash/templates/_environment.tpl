{{/* The settings of a hive as its environment. */}}

{{/* A variable; takes a list of its name and its value. Lists and maps are JSON, as the hub reads them. Kubernetes
     would put other variables in the place of $(NAME). */}}
{{- define "ash.variable" -}}
{{- $value := index . 1 -}}
- name: ASH_HUB_{{ index . 0 | upper }}
  value: {{ ternary $value (toJson $value) (kindIs "string" $value) | replace "$(" "$$(" | quote }}
{{- end }}

{{/* The names by which the hive may be addressed, as a JSON list. */}}
{{- define "ash.allowedHosts" -}}
{{- $name := include "ash.name" . -}}
{{- $services := list $name -}}
{{- if .Values.router.enabled }}{{ $services = append $services (printf "%s-router" $name) }}{{ end -}}
{{- if .Values.seedServices.enabled }}{{ $services = concat $services (list "control-plane" "gateway") }}{{ end -}}
{{- $hosts := .Values.hub.settings.allowed_hosts | default list -}}
{{- range $services -}}
{{- $inside := printf "%s.%s" . $.Release.Namespace -}}
{{- $hosts = concat $hosts (list . $inside (printf "%s.svc" $inside) (printf "%s.svc.%s" $inside $.Values.clusterDomain)) -}}
{{- end -}}
{{- if .Values.ingress.enabled }}{{ $hosts = concat $hosts .Values.ingress.hosts }}{{ end -}}
{{- if .Values.httpRoute.enabled }}{{ $hosts = concat $hosts .Values.httpRoute.hostnames }}{{ end -}}
{{- $hosts | uniq | toJson -}}
{{- end }}

{{/* Every address of a pod, as the sandboxes' setting has it. */}}
{{- define "ash.anywhere" -}}
{{- ternary "[::]" "0.0.0.0" (eq (.Values.sandboxes.settings.listen_host | default "") "::") -}}
{{- end }}

{{/* What an egress proxy reads (hub/ash_hub/egress/shared.py). */}}
{{- define "ash.egressConfig" -}}
{{- $any := include "ash.anywhere" . -}}
{{- $hive := printf "%s-policies.%s.svc.%s:8423" (include "ash.name" .) .Release.Namespace .Values.clusterDomain -}}
{{- $drain := sub (int .Values.egress.terminationGracePeriodSeconds) 8 -}}
{{- dict "listen" (printf "%s:3128" $any) "health" (printf "%s:3129" $any) "hive" $hive "key" "/etc/ash/key/body" "connections" .Values.egress.connections "drain_seconds" $drain | toJson -}}
{{- end }}

{{- define "ash.environment" -}}
{{- $settings := deepCopy .Values.hub.settings -}}
{{- $auth := $settings.auth | default dict -}}
{{- $_ := set $auth "open_paths" (append ($auth.open_paths | default list) "/readyz" | uniq) -}}
{{- $_ := set $settings "auth" $auth -}}
{{- $_ := set $settings "allowed_hosts" (include "ash.allowedHosts" . | fromJsonArray) -}}
{{- $_ := set $settings "state_dir" "/var/lib/ash/hive" -}}
{{- $_ := set $settings "run_dir" "/run/ash/hive" -}}
{{- if .Values.recipes -}}
{{- $_ := set $settings "recipe_dirs" (append ($settings.recipe_dirs | default list) "/etc/ash/recipes") -}}
{{- end -}}
{{- $backend := dict "kind" "kubernetes" "hive" (include "ash.hive" .) "namespace" (include "ash.sandboxNamespace" .) "system_namespace" .Release.Namespace -}}
{{- if .Values.egress.enabled -}}
{{- $_ := set $backend "egress_proxy" (printf "%s-egress.%s.svc.%s:3128" (include "ash.name" .) .Release.Namespace .Values.clusterDomain) -}}
{{- $_ := set $backend "egress_listen" (printf "%s:8423" (include "ash.anywhere" .)) -}}
{{- end -}}
{{- $_ := set $settings "backend" (mergeOverwrite (deepCopy .Values.sandboxes.settings) $backend) -}}
{{- range $name, $value := $settings -}}
{{- if not (kindIs "invalid" $value) }}
{{ include "ash.variable" (list $name $value) }}
{{- end }}
{{- end }}
{{- if include "ash.hasRedis" . }}
- name: ASH_HUB_REDIS_URL
  {{- if .Values.redis.enabled }}
  value: redis://{{ include "ash.name" . }}-redis:6379/0
  {{- else if .Values.redis.url }}
  valueFrom: {secretKeyRef: {name: {{ include "ash.name" . }}-redis-url, key: url}}
  {{- else }}
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.existingSecret.name }}, key: {{ .Values.redis.existingSecret.key }}}}
  {{- end }}
{{- end }}
{{- end }}
